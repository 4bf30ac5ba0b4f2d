"""What every measurement needs: timing, memory, gate, rows, environment."""
