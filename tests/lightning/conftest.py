"""What every fit starts from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def _blank_pictures() -> Iterator[None]:
    from tests.blank_pictures import leave_blank  # noqa: PLC0415  # As in the conftest above.

    with pytest.MonkeyPatch.context() as patch:
        leave_blank(patch)
        yield
