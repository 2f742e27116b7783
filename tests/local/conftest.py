"""What the compiler remembers of one test is not for the next."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> None:
    torch._dynamo.reset()
