"""`GENFT` among PEFT's types: PEFT looks methods up in an enumeration, which has no way of its own to grow."""

from __future__ import annotations

from peft.utils import PeftType


def extend(name: str) -> PeftType:
    """The member of that name, made if it is not there."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    type.__setattr__(PeftType, name, member)  # an enumeration's own refuses
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    return member


GENFT = extend("GENFT")
