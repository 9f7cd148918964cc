"""The optimizers of train.py: Muon for the matrices inside the blocks, an Adam of its own for embeddings and norms."""

import math
from typing import List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from model import GPT

# Coefficients of the four odd polynomials of the Polar Express (Amsel et al. 2025, arXiv 2505.16932, computed for
# l = 0.005): each is the best next step given what the ones before leave, where Newton-Schulz repeats one polynomial.
# A fifth would take a quarter more time in each step and learnt nothing more, in as many steps or in as much time.
POLAR_EXPRESS = (
    (8.071953651508741, -22.533057657946422, 16.196227794759977),
    (3.8709608025812767, -2.815043888606816, 0.5271131450405645),
    (3.158134597458921, -2.321527048205576, 0.4748943010677414),
    (2.1999561774908236, -1.5769927170227864, 0.40893023434352227),
)


def polar_express(x: Tensor) -> Tensor:
    """The polynomials on a stack (N, R, C) of matrices with R <= C."""
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)  # every singular value is now at most 1
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def orthogonalize(matrices: Tensor, side: Optional[int] = None) -> Tensor:
    """The nearest semi-orthogonal matrices to a stack (N, R, C): U V^T where each is U S V^T, to 8 per cent.

    With `side`, blocks of so many rows (columns, where these are fewer) are orthogonalized each for itself, if the
    matrix divides into such. In bfloat16 on a GPU; in float32 on a CPU, where bfloat16 products can be hundreds of
    times slower.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    if flipped := x.size(-2) > x.size(-1):
        x = x.mT
    shape = x.shape
    if side and shape[-2] % side == 0:
        x = x.reshape(-1, side, shape[-1])
    if x.is_cuda:
        x = polar_express(x)
    else:  # in parts that stay in the caches: a fifth less time at width 768
        x = torch.cat([polar_express(part) for part in x.split(max(1, 2**19 // x[0].numel()))])
    x = x.reshape(shape)
    return (x.mT if flipped else x).to(matrices.dtype)


def unless(found_inf: Tensor) -> Union[float, Tensor]:
    """1 for a step that counts, 0 for one that must change nothing: a number on a CPU, where a look costs no waiting.

    With numbers, and no copies for their sake, a step of the tiny preset's Muon takes 16 ms in place of 19.
    """
    return 1.0 - (float(found_inf) if found_inf.device.type == "cpu" else found_inf)


def clean(grad: Tensor, ok: Union[float, Tensor]) -> Tensor:
    """The gradient, zeros in a step that must change nothing."""
    if isinstance(ok, Tensor):
        return torch.where(ok > 0, grad, 0.0)
    return grad if ok else torch.zeros_like(grad)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

    Each group holds parameters of one shape; `rows` says which row blocks of such a parameter are matrices of their own
    (q, k and v are stored as one), `side` how large the blocks are that orthogonalize takes of them. Equal shapes go
    through the products as one stack: for small models ten times quicker than one by one. `found_inf` (a tensor, set
    by the trainer) > 0 turns a step into nothing, without a look from the host.
    """

    found_inf: Tensor

    def __init__(self, groups: Sequence[dict], lr: float, momentum: float = 0.95, weight_decay: float = 0.0,
                 side: Optional[int] = None):
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.side = side

    @torch.no_grad()
    def step(self) -> None:
        ok = unless(self.found_inf)
        stacks: dict[torch.Size, List[Tensor]] = {}
        places = []  # (group, parameter, [(shape, index in its stack) a row block])
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                grad = clean(parameter.grad, ok)
                state["momentum"].lerp_(grad, (1 - group["momentum"]) * ok)
                nesterov = grad.lerp(state["momentum"], group["momentum"])
                # fully_shard keeps a part of each matrix here; the products need all of it
                whole = nesterov.full_tensor() if hasattr(nesterov, "full_tensor") else nesterov
                slots = []
                for block in whole.split(group["rows"]):
                    stack = stacks.setdefault(block.shape, [])
                    slots.append((block.shape, len(stack)))
                    stack.append(block)
                places.append((group, parameter, slots))
        done = {shape: orthogonalize(torch.stack(stack), self.side) for shape, stack in stacks.items()}
        for group, parameter, slots in places:
            # sqrt(rows / columns) keeps the size of what a matrix adds to its output the same for every shape
            updates = [done[shape][index].mul_(max(1.0, shape[0] / shape[1]) ** 0.5 * group["lr"] * ok)
                       for shape, index in slots]
            parameter.mul_(1 - group["lr"] * group["weight_decay"] * ok)
            if hasattr(parameter, "full_tensor"):
                from torch.distributed.tensor import distribute_tensor
                parameter.sub_(distribute_tensor(torch.cat(updates), parameter.device_mesh, parameter.placements))
            else:
                for part, update in zip(parameter.split(group["rows"]), updates, strict=True):
                    part.sub_(update)


class FlooredAdam(torch.optim.Optimizer):
    """Adam (Kingma & Ba 2014, arXiv 1412.6980) that divides by sqrt(v) + `floor` times its root mean square.

    Plain Adam moves each element at the full rate however faint its gradient. The softmax pushes every token that a
    batch does not hold a little one way: rare tokens would all go there and end alike (cf. Stollenwerk & Stollenwerk
    2025, arXiv 2502.08441, who share one v among all tokens, which slows rare ones where they do occur).
    `found_inf` is that of Muon.
    """

    found_inf: Tensor

    def __init__(self, parameters: Sequence[Tensor], lr: float, betas: Tuple[float, float] = (0.9, 0.95),
                 floor: float = 0.3):
        super().__init__(parameters, dict(lr=lr, betas=betas, floor=floor))

    @torch.no_grad()
    def step(self) -> None:
        ok = unless(self.found_inf)
        for group in self.param_groups:
            (beta1, beta2), floor = group["betas"], group["floor"]
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
                state["step"] += 1
                grad = clean(parameter.grad, ok)
                mean = state["exp_avg"].lerp_(grad, (1 - beta1) * ok)
                square = state["exp_avg_sq"].lerp_(grad.square(), (1 - beta2) * ok)
                divisor = square.sqrt().add_(square.mean().sqrt() * floor + 1e-12)
                rate = group["lr"] * (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
                parameter.sub_(mean.div(divisor).mul_(ok * rate))


def block_side(tokens: int) -> int:
    """Rows of the blocks in which Muon orthogonalizes, for steps of so many tokens: a power of two, 32 or more.

    Orthogonalizing costs some 16 FLOPs an element for each row of its matrix, a gradient 6 an element for each token.
    In blocks (cf. Khaled et al. 2025, arXiv 2510.16981) it takes at most a fifth of what the gradient takes; with the
    batches of a GPU the blocks are the matrices.
    """
    return max(32, 2 ** int(math.log2(0.2 * 6 * tokens / 16)))


def make_optimizers(model: GPT, learning_rate: float, embedding_lr: float, weight_decay: float,
                    tokens: int) -> List[torch.optim.Optimizer]:
    """[Muon, FlooredAdam] over all parameters of a model trained in steps of so many tokens.

    Weight decay goes to matrices alone.
    """
    config, matrices, others = model.config, [], []
    kv = config.n_kv_head * config.head_dim
    rows = {"attention.qkv.weight": [config.n_head * config.head_dim, kv, kv], "ffn.gate_up.weight": [config.d_ff] * 2}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name.startswith("blocks."):
            split = next((sizes for suffix, sizes in rows.items() if name.endswith(suffix)), [parameter.size(0)])
            matrices.append(dict(params=[parameter], rows=split))
        else:
            others.append(parameter)
    muon = Muon(matrices, lr=learning_rate, weight_decay=weight_decay, side=block_side(tokens))
    adam = FlooredAdam(others, lr=embedding_lr)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]  # what the schedule scales
    return [muon, adam]
