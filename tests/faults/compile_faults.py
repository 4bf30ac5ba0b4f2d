"""Faults in what compiles code and keeps it: trust, damage, compilers that do not end; and in what is read off it."""

from tests.faults.planting import Fault

CACHE = "genft_kernels/backends/compiled/cache.py"
RUN = "genft_kernels/backends/compiled/run.py"
OF_CACHE = ["tests/backends/test_compile_cache.py", "tests/backends/test_compile_cache_users.py"]
OF_RUN = ["tests/backends/test_compiler_run.py"]

MACHINE_CODE = "benchmarks/compiled/machine_code.py"
REPORT = "benchmarks/compiled/triton_report.py"
OF_REPORT = ["tests/benchmarks/test_machine_code.py"]

FAULTS = [
    Fault(
        "kernels report: spills of inner loops only",
        MACHINE_CODE,
        "any(begin < place < end",
        "all(begin < place < end",
        OF_REPORT,
    ),
    Fault("kernels report: a spill is a store", MACHINE_CODE, '("STL", "LDL")', '("STL", "STL")', OF_REPORT),
    Fault("kernels report: spills in loops pass", REPORT, 'if row["spills_in_loops"]', "if False", OF_REPORT),
    Fault(
        "kernels report: any number of spills passes", REPORT, "LOOPS = 0.01, 0.002", "LOOPS = 1.0, 0.002", OF_REPORT
    ),
    Fault("kernels report: any in float32's loops", REPORT, "LOOPS = 0.01, 0.002", "LOOPS = 0.01, 1.0", OF_REPORT),
    Fault("compile cache: root trusts everybody", CACHE, "not in (0, os.geteuid())", "in ()", OF_CACHE),
    Fault("compile cache: what others may write is trusted", CACHE, "& 0o022", "& 0", OF_CACHE),
    Fault("compile cache: the folder not looked at", CACHE, "(folder, *(entry if", "(*(entry if", OF_CACHE),
    Fault("compile cache: the files not looked at", CACHE, "*(entry if found else ())", "*()", OF_CACHE),
    Fault("compile cache: damage not noticed", CACHE, '!= manifest["sha256"]', "is None", OF_CACHE),
    Fault("compile cache: noexec not noticed", CACHE, 'getattr(os, "ST_NOEXEC", 0)', "0", OF_CACHE),
    Fault("compile cache: entries only for their owner", CACHE, "os.O_EXCL, 0o644", "os.O_EXCL, 0o600", OF_CACHE),
    Fault(
        "compile cache: compiled by every process",
        CACHE,
        "    with held:",
        "    held.lock.release()\n    if True:",
        OF_CACHE,
    ),
    Fault("compile cache: leftovers stay", CACHE, "shutil.rmtree(leftover, ignore_errors=True)", "pass", OF_CACHE),
    Fault("compiler: waited for without end", RUN, "timeout=limit", "timeout=30", OF_RUN),
    Fault(
        "compiler: its children left alone",
        RUN,
        "os.killpg(process.pid, how)",
        "process.send_signal(signal.SIGKILL)",
        OF_RUN,
    ),
    Fault(
        "compiler: those of ninja left alone",
        RUN,
        "for how in (signal.SIGTERM, signal.SIGKILL):",
        "for how in (signal.SIGKILL,):",
        ["tests/backends/test_build.py", "-k", "does_not_compile"],
    ),
]
