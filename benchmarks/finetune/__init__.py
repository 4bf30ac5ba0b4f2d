"""Fine-tune real models with GenFT, LoRA and others, at settings chosen for each, and compare them."""
