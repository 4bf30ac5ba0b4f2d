"""One block of mixture-of-experts: GenFT's updates beside PEFT's LoRA by `target_parameters`."""
