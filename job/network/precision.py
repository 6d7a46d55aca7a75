"""How matrix units round float32 operands, on the whole process."""

import torch


def set_precision(precision: str) -> None:
    """Let the matrix units round float32 operands to TF32, in convolutions and matrix products, or not."""
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
