"""Methods that are compared: each freezes the model and returns it with its own part trainable."""

from .genft import FAST, FAST_BOTH, OFFICIAL, ROW, TILED, WEGEFT
from .method import Method, Unsuitable, optimizer_groups, settings_of, trainable_parameters
from .peft import FOURIERFT, LORA, VERA
from .plain import BITFIT, PROBE

__all__ = ["METHODS", "Method", "Unsuitable", "optimizer_groups", "settings_of", "trainable_parameters"]

METHODS: dict[str, Method] = {
    "fast": FAST, "lora": LORA, "wegeft": WEGEFT, "row": ROW, "fast-both": FAST_BOTH, "tiled": TILED,
    "official": OFFICIAL, "vera": VERA, "fourierft": FOURIERFT, "bitfit": BITFIT, "probe": PROBE,
}  # fmt: skip
