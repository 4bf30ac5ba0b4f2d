"""Fine-tune a real encoder on real questions with GenFT, LoRA and a linear probe, and compare them.

`python -m benchmarks.finetune` compares; with --sweep it chooses the learning rates for that.
"""

import os

# Everything comes from installed packages. Hugging Face libraries read this when they are first imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
