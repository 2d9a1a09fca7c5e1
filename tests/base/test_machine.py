"""What is computed on if nobody says."""

from __future__ import annotations

import pytest
import torch

from lorabake.base.errors import UserError
from lorabake.base.machine import check_device, usual_device, usual_precision

GPU = torch.cuda.is_available()


def test_the_gpu_is_used_where_there_is_one() -> None:
    assert usual_device()[0] == ("cuda" if GPU else "cpu")
    assert usual_precision("cpu")[0] == "fp32"
    if not (GPU and not torch.cuda.is_bf16_supported(including_emulation=False)):
        assert usual_precision("cuda")[0] == "bf16"


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told() -> None:
    check_device("cpu", "train.device")
    with pytest.raises(UserError, match=r'^train\.device is "cuda", and PyTorch finds no GPU here'):
        check_device("cuda", "train.device")
