from ml_collections import config_dict, config_flags
from ml_collections.config_dict import ConfigDict, FrozenConfigDict

__all__ = ["ConfigDict", "FrozenConfigDict", "config_dict", "config_flags"]
