"""`make mutations`: plant one fault at a time in a copy of the package, and see that a test turns red.

Exits with 1 if a fault survives, if its text is no longer there, or if the unchanged copy fails its tests. Arguments:
`--help` lists them.
"""

import sys

from tests.faults import (
    accumulate_faults,
    choice_faults,
    compile_faults,
    cpu_faults,
    expert_faults,
    export_faults,
    file_faults,
    finetune_faults,
    held_faults,
    integration_faults,
    model_faults,
    operation_faults,
    peft_faults,
    quantised_faults,
    round_faults,
    settings_faults,
)
from tests.faults.planting import main

FAULTS = [
    fault
    for each in (
        operation_faults,
        cpu_faults,
        model_faults,
        held_faults,
        round_faults,
        accumulate_faults,
        settings_faults,
        file_faults,
        integration_faults,
        compile_faults,
        choice_faults,
        export_faults,
        peft_faults,
        quantised_faults,
        expert_faults,
        finetune_faults,
    )
    for fault in each.FAULTS
]

if __name__ == "__main__":
    sys.exit(main(FAULTS))
