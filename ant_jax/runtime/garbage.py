"""Python's garbage collector in programs that trace and compile."""

import gc


def collect_less() -> None:
    """Makes the collector run less often and skip all objects that exist now; call after imports.

    Tracing makes millions of small objects that live on. By default Python therefore looks at all
    objects over and over, those of all imported modules too, which takes a sixth of a start. In
    exchange, arrays in reference cycles are freed later.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)
