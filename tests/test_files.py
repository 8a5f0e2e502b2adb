import errno
import os

import pytest

from ant_jax.files import locked


def test_an_error_under_a_lock_is_not_that_of_the_lock(tmp_path):
    with pytest.raises(OSError) as raised, locked(tmp_path / ".lock"):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    assert raised.value.filename is None
