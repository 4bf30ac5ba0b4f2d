"""Fine-tune a real encoder on real questions with GenFT, LoRA and a linear probe, and compare them.

Run ``python -m benchmarks.finetune`` for the comparison and ``python -m benchmarks.finetune.sweep`` for the
learning rates that it uses.
"""

import os

# Everything comes from installed packages. Hugging Face libraries read this when they are first imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The profiler, which counts memory, warns of what is older than itself, in the middle of the progress bars.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
