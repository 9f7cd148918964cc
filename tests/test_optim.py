"""optim.py: what orthogonalizing does, and that one Muon step is the plain formula for every matrix on its own."""

import pytest
import torch

from model import GPT, GPTConfig
from optim import FlooredAdam, Muon, block_side, make_optimizers, orthogonalize

SIZES = dict(vocab_size=61, context_length=16, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=40, head_dim=8)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 40), (2, 40, 8), (1, 1, 12)])
def test_orthogonalizing_keeps_the_directions_and_sets_all_singular_values_near_one(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalize(matrices)
    values = torch.linalg.svdvals(result)
    # a square random matrix has values near 0 in any sample, which five steps lift only part of the way
    assert values.max() < 1.2
    assert values.median() > 0.8
    in_their_basis = u.mT @ result @ vt.mT
    off_diagonal = in_their_basis - torch.diag_embed(in_their_basis.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-3


def test_a_stack_is_orthogonalized_as_each_matrix_alone():
    matrices = torch.randn(5, 12, 20)
    torch.testing.assert_close(orthogonalize(matrices),
                               torch.cat([orthogonalize(m[None]) for m in matrices]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("shape", "blocks"), [
    ((12, 20), [(4, 20)] * 3), ((20, 12), [(20, 4)] * 3), ((8, 8), [(4, 8)] * 2), ((10, 20), [(10, 20)]),
    ((4, 4), [(4, 4)])])
def test_in_blocks_each_is_orthogonalized_for_itself(shape, blocks):
    matrices = torch.randn(3, *shape)
    parts = matrices.split(4, dim=2 if shape[0] > shape[1] else 1) if len(blocks) > 1 else [matrices]
    assert [tuple(part.shape[1:]) for part in parts] == blocks
    plain = torch.cat([orthogonalize(part) for part in parts], dim=2 if shape[0] > shape[1] else 1)
    torch.testing.assert_close(orthogonalize(matrices, 4), plain, atol=1e-5, rtol=1e-4)


def test_small_steps_orthogonalize_in_blocks_and_large_ones_whole_matrices():
    assert [block_side(tokens) for tokens in (1, 2048, 4096, 16384, 262144)] == [32, 128, 256, 1024, 16384]
    model = a_model_with_gradients()
    for tokens in (64, 2048):
        assert make_optimizers(model, 0.1, 0.01, 0.5, tokens)[0].side == block_side(tokens)


def a_model_with_gradients() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def test_one_step_is_the_plain_formula_for_every_matrix_and_fused_rows_are_matrices_of_their_own():
    model = a_model_with_gradients()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    muon, adam = make_optimizers(model, learning_rate=0.1, embedding_lr=0.01, weight_decay=0.5, tokens=2048)
    muon.found_inf = adam.found_inf = torch.zeros(())
    muon.step()
    adam.step()
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or not name.startswith("blocks."):
            grad = parameter.grad  # in the first step Adam's moments are those of this one gradient
            plain = grad / (grad.abs() + 0.3 * grad.square().mean().sqrt())
            torch.testing.assert_close(parameter.data, before[name] - 0.01 * plain, atol=1e-6, rtol=1e-4)
            continue
        rows = [32, 16, 16] if "qkv" in name else [40, 40] if "gate_up" in name else [parameter.size(0)]
        momentum = 0.05 * parameter.grad
        nesterov = parameter.grad.lerp(momentum, 0.95)
        update = torch.cat([orthogonalize(part[None])[0] * max(1.0, part.size(0) / part.size(1)) ** 0.5
                            for part in nesterov.split(rows)])
        torch.testing.assert_close(parameter.data, before[name] * (1 - 0.1 * 0.5) - 0.1 * update, atol=1e-5, rtol=1e-4)


def test_with_no_floor_adam_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = (torch.ones(4, 3, requires_grad=True) for _ in range(2))
    adam, reference = FlooredAdam([ours], lr=0.01, floor=0.0), torch.optim.Adam([theirs], 0.01, (0.9, 0.95), 1e-12)
    adam.found_inf = torch.zeros(())
    for _ in range(5):
        ours.grad = torch.randn(4, 3)
        theirs.grad = ours.grad.clone()
        adam.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_an_embedding_with_faint_gradients_keeps_its_place_while_one_in_use_moves():
    table = torch.zeros(50, 8, requires_grad=True)
    adam = FlooredAdam([table], lr=0.01)
    adam.found_inf = torch.zeros(())
    for _ in range(20):
        table.grad = torch.full((50, 8), 1e-4)
        table.grad[0] = 1.0
        adam.step()
    assert table[0].abs().min() > 0.15
    assert table[1:].abs().max() < 0.003


def test_every_parameter_has_exactly_one_optimizer():
    model = a_model_with_gradients()
    held = [id(p) for optimizer in make_optimizers(model, 0.1, 0.1, 0.0, 2048)
            for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_a_step_with_found_inf_changes_nothing():
    model = a_model_with_gradients()
    optimizers = make_optimizers(model, 0.1, 0.1, 0.5, 2048)
    for found_inf in (0.0, 1.0):
        before = [p.detach().clone() for p in model.parameters()]
        momenta = [s["momentum"].clone() for s in optimizers[0].state.values()]
        for optimizer in optimizers:
            optimizer.found_inf = torch.tensor(found_inf)
            optimizer.step()
        same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert all(same) if found_inf else not any(same)
        for parameter in model.parameters():
            parameter.grad.fill_(float("nan"))
    after = [s["momentum"] for s in optimizers[0].state.values()]
    assert all(torch.equal(a, b) for a, b in zip(momenta, after, strict=True))
    assert isinstance(optimizers[0], Muon)
