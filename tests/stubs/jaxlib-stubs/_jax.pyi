# jaxlib's own stub is not in its wheels. Without it, `jax.Device` is no type.
from typing import Any

class Device:
    id: int
    platform: str
    device_kind: str
    process_index: int
    def memory_stats(self) -> dict[str, int] | None: ...

def __getattr__(name: str) -> Any: ...
