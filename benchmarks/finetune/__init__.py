"""Fine-tune a real encoder on real questions with GenFT, LoRA and a linear probe, and compare them."""
