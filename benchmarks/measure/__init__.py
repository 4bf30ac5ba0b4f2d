"""The parts of every measurement: timing, memory, gate, rows, environment."""
