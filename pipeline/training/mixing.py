"""MOHAWK's first phase, matrix orientation (arXiv 2408.10189): a mixer's scan made to mix tokens as the attention did.

A scan of given inputs is a product with a lower-triangular matrix a head, and so is attention: the phase brings one
matrix towards the other. It trains what makes the matrix (step sizes, decays, B and C), not what is mixed or what
follows.

Shapes: B batch, L length, D hidden size, H heads, P head dimension (of B and C).
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.mixer import Mamba2Mixer
from pipeline.training.batch import Batch, TapBatch
from pipeline.training.recompute import TeacherLayers

# Parameters of a mixer that follow the scan: no matrix depends on them.
AFTER_SCAN = ("norm", "out_proj")


def mixing_matrix(mixer: Mamba2Mixer, u_BLD: Tensor) -> Tensor:
    """The matrices [B, H, L, L], at least float32, by which the mixer's scan mixes the rows of x, head by head.

    ``M[i, j] = C_i · B_j exp(sum_{k=j+1..i} dt_k A) dt_j`` for j ≤ i, and D more where j = i (Dao & Gu 2024,
    arXiv 2405.21060, equation 3): ``M @ x`` is the scan's output.
    """
    _, dt_BLH, a_H, b_BLHP, c_BLHP, d_H = mixer.scan_inputs(u_BLD)
    wide = torch.promote_types(dt_BLH.dtype, b_BLHP.dtype)
    decay_BHL = (dt_BLH * a_H).mT.cumsum(-1)
    above = torch.ones(u_BLD.shape[1], u_BLD.shape[1], dtype=torch.bool, device=u_BLD.device).triu(1)
    # in place, because a matrix is the largest thing here
    weight = (decay_BHL[..., :, None] - decay_BHL[..., None, :]).masked_fill_(above, -torch.inf).exp_()
    fed_BLHP = b_BLHP.to(wide) * dt_BLH[..., None]
    matrix = torch.einsum("bihp,bjhp->bhij", c_BLHP.to(wide), fed_BLHP) * weight
    matrix.diagonal(dim1=-2, dim2=-1).add_(d_H[:, None])
    return matrix


def matrix_loss(matrix_BHLL: Tensor, weights_BHLL: Tensor, mask_BL: Tensor) -> Tensor:
    """How far the mixing matrices are from the attention's weights, summed over samples.

    A sample of n real tokens gives ``n Σ_h ‖M_h - W_h‖² / Σ_h ‖W_h‖²`` over the rows of its real tokens, so that 1 a
    token is what matrices of zeros would give, as in the layer loss ``mse``. Within a sample it is the squared
    Frobenius norm of MOHAWK.
    """
    real = mask_BL[:, None, :, None].bool()
    # masked, not multiplied: rows of padding may be no numbers at all
    squares_B = (matrix_BHLL - weights_BHLL).masked_fill(~real, 0).square().sum((1, 2, 3))
    power_B = weights_BHLL.masked_fill(~real, 0).square().sum((1, 2, 3))
    return (mask_BL.sum(1) * squares_B / power_B).sum()


def require_matrix(mixer: Mamba2Mixer) -> None:
    """Has exactly those parameters of the mixer require gradients that its matrices depend on."""
    for name, parameter in mixer.named_parameters():
        parameter.requires_grad_(name.partition(".")[0] not in AFTER_SCAN)


class MatrixObjective(nn.Module):
    """The matrix loss of every mixer on the teacher's inputs, against the weights of the attention it replaced.

    Memory does not grow with the batch: samples go one by one, each cut to its real tokens, and their matrices are made
    again in the backward pass. At most about eight matrices of one sample are there at a time, 4 H L² bytes each:
    32 heads and 2,048 tokens take 4.3 GB, and 1,024 tokens a quarter of that.
    """

    def __init__(self, mixers: dict[int, Mamba2Mixer], teacher: TeacherLayers) -> None:
        super().__init__()
        self.teacher = teacher
        self.mixers = nn.ModuleDict({str(i): m for i, m in mixers.items()})

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over layers of the mean matrix loss a token; the metrics ``layer_{i}`` are its terms."""
        assert batch.taps is not None, "a match step goes over tapped rows only"
        metrics = {
            f"layer_{name}": self._layer(int(name), batch.taps) / batch.totals.tap_tokens for name in self.mixers
        }
        return torch.stack(list(metrics.values())).sum(), metrics

    def _layer(self, layer: int, taps: TapBatch) -> Tensor:
        value = taps.layers[layer][0]
        total = torch.zeros((), device=taps.mask.device)
        for row, tokens in enumerate(taps.mask.sum(1).tolist()):
            u_LD = value.tokens(slice(row, row + 1)).wide()[:, :tokens]
            total = total + checkpoint(self._sample, layer, u_LD, use_reentrant=False)
        return total

    def _sample(self, layer: int, u_BLD: Tensor) -> Tensor:
        mixer = self.mixers[str(layer)]
        assert isinstance(mixer, Mamba2Mixer)
        matrix = mixing_matrix(mixer, u_BLD.to(mixer.in_proj.weight.dtype))
        return matrix_loss(matrix, self.teacher.weights(layer, u_BLD), torch.ones_like(u_BLD[..., 0]))
