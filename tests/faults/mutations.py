"""`make mutations`: plant one fault at a time in a copy of the package, and see that a test turns red.

Exits with 1 if a fault survives, or if its text is no longer there. The unchanged copy must pass first. Arguments:
words of the faults wanted.
"""

import sys

from tests.faults import (
    choice_faults,
    compile_faults,
    cpu_faults,
    expert_faults,
    file_faults,
    finetune_faults,
    integration_faults,
    model_faults,
    operation_faults,
    peft_faults,
    quantised_faults,
    settings_faults,
)
from tests.faults.planting import plant

FAULTS = [
    fault
    for each in (
        operation_faults,
        cpu_faults,
        model_faults,
        settings_faults,
        file_faults,
        integration_faults,
        compile_faults,
        choice_faults,
        peft_faults,
        quantised_faults,
        expert_faults,
        finetune_faults,
    )
    for fault in each.FAULTS
]

if __name__ == "__main__":
    sys.exit(plant([fault for fault in FAULTS if " ".join(sys.argv[1:]) in fault.what]))
