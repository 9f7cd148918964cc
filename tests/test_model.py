"""model.py: attention against its formula, cached against uncached decoding, sampling, and files that lie."""

import io
import json
import math
import os
import pickle
import struct
import zipfile
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model import (
    GPT,
    Checkpoint,
    GPTConfig,
    InputError,
    KVCache,
    LinearCrossEntropy,
    SingleDotAttention,
    rotate,
    sample,
)

SIZES = dict(vocab_size=97, context_length=48, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48, head_dim=8)
DEEP = dict(SIZES, n_layer=32, tie_embeddings=False)
EVERY_KIND = [dict(SIZES, qk_norm=qk_norm, tie_embeddings=tied, n_kv_head=kv)
              for qk_norm in (True, False) for tied in (True, False) for kv in (1, 4)]


def random_model(seed: int = 0, **changes) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1))
    return model


# ------------------------------------------------------------------------------------------------------- parity


def test_attention_of_one_head_is_its_formula():
    q, k, v = torch.randn(3, 11, 8)
    scores = (q @ k.T / math.sqrt(8)).masked_fill(torch.ones(11, 11).triu(1).bool(), -math.inf)
    torch.testing.assert_close(SingleDotAttention()(q[None], k[None], v[None])[0], scores.softmax(-1) @ v)


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_all_heads_at_once_are_a_loop_over_heads(n_kv_head):
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, n_kv_head, 9, 8), torch.randn(2, n_kv_head, 9, 8)
    attention = SingleDotAttention()
    group = 4 // n_kv_head
    one_by_one = [attention(q[:, h:h + 1], k[:, h // group:h // group + 1], v[:, h // group:h // group + 1])
                  for h in range(4)]
    torch.testing.assert_close(attention(q, k, v), torch.cat(one_by_one, dim=1))


def test_rotary_is_a_rotation_of_complex_pairs():
    x, angle = torch.randn(2, 5, 3, 8), torch.randn(5, 1, 4)
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(rotate(x, angle.cos(), angle.sin()), torch.cat((pairs.real, pairs.imag), -1))


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_scripted_model_gives_the_same_logits(kind):
    model = random_model(**kind)
    ids = torch.randint(0, 97, (3, 17))
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(ids, None)[0], model(ids)[0])
    assert torch.equal(scripted(ids, ids)[1], model(ids, ids)[1])


@pytest.mark.parametrize("prompt", [1, 2, 47, 48])
@pytest.mark.parametrize("kind", EVERY_KIND[:4])
def test_cached_and_uncached_logits_agree_at_every_position(prompt, kind):
    model = random_model(**kind)
    ids = torch.randint(0, 97, (2, 48))
    whole, cache = model(ids)[0], model.new_cache(batch_size=2)
    parts = [model(ids[:, :prompt], None, cache)[0]]
    parts += [model(ids[:, at:at + 1], None, cache)[0] for at in range(prompt, 48)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_a_cache_filled_in_any_steps_gives_the_logits_of_one_forward(steps):
    model, ids = random_model(), torch.randint(0, 97, (1, 48))
    cache, at, parts = model.new_cache(), 0, []
    for step in steps:
        step = min(step, 48 - at)
        if step:
            parts.append(model(ids[:, at:at + step], None, cache)[0])
            at += step
    torch.testing.assert_close(torch.cat(parts, 1), model(ids[:, :at])[0], atol=2e-5, rtol=1e-4)


def test_a_truncated_cache_forgets_exactly_what_came_after():
    model, ids = random_model(), torch.randint(0, 97, (1, 20))
    cache = model.new_cache()
    model(ids, None, cache)
    cache.truncate(7)
    again = model(ids[:, 7:], None, cache)[0]
    torch.testing.assert_close(again, model(ids)[0][:, 7:], atol=2e-5, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(2, 70000), st.floats(0, 1), st.integers(0, 2**31))
def test_the_chunked_loss_and_its_gradients_are_those_of_cross_entropy(rows, vocabulary, ignored, seed):
    torch.manual_seed(seed)
    x = torch.randn(rows, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    targets = torch.randint(0, vocabulary, (rows,)).masked_fill(torch.rand(rows) < ignored, -100)
    plain = F.cross_entropy(F.linear(x, weight), targets, reduction="sum")
    expected = torch.autograd.grad(plain, (x, weight))
    with patch.object(LinearCrossEntropy, "CPU_LOGITS", 0):  # chunks of 64 rows
        ours = LinearCrossEntropy.apply(x, weight, targets)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    for got, want in zip(torch.autograd.grad(ours, (x, weight)), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_the_training_loss_is_the_mean_loss_of_forward(kind):
    model = random_model(**kind)
    ids, targets = torch.randint(0, 97, (2, 3, 20))
    targets[:, :6] = -100
    mean = model(ids, targets)[1]
    torch.testing.assert_close(model.loss(ids, targets) / (targets >= 0).sum(), mean)


# --------------------------------------------------------------------------------------------------- properties


def test_the_gradient_of_a_logit_is_zero_after_its_position():
    model = random_model()
    x = model.token_embedding(torch.randint(0, 97, (1, 12))).detach().requires_grad_()
    model.token_embedding.register_forward_hook(lambda *_: x)
    model(torch.zeros(1, 12, dtype=torch.long))[0][0, 5].sum().backward()
    reach = x.grad[0].abs().sum(-1)
    assert (reach[:6] > 0).all()
    assert (reach[6:] == 0).all()


@pytest.mark.parametrize("d_model", [32, 128])
def test_a_new_model_is_near_a_uniform_guess(d_model):
    torch.manual_seed(0)
    ids, targets = torch.randint(0, 97, (2, 4, 32))
    assert abs(GPT(GPTConfig(**{**SIZES, "d_model": d_model}))(ids, targets)[1].item() - math.log(97)) < 0.2


@pytest.mark.parametrize("changes", [dict(), dict(qk_norm=False), dict(n_kv_head=1), dict(n_head=4),
                                     dict(rope_theta=100.0), dict(d_model=768)])
def test_the_first_two_heads_of_a_new_model_look_one_and_two_tokens_back(changes):
    torch.manual_seed(0)
    config = GPTConfig(**{**SIZES, "context_length": 128, "n_head": 2, "d_model": 128, "head_dim": 64, **changes})
    model = GPT(config)
    seen = {}
    model.blocks[0].attention.attention.register_forward_hook(lambda _, args, __: seen.update(q=args[0], k=args[1]))
    model(torch.randint(0, 97, (1, 128)))
    for head in (0, 1):
        q, k = seen["q"][0, head], seen["k"][0, head * config.n_kv_head // config.n_head]
        scores = (q @ k.T / 8).masked_fill(torch.ones(128, 128).triu(1).bool(), -math.inf)
        assert scores.softmax(-1).diagonal(-1 - head).mean() > 0.5


def test_given_token_vectors_are_half_of_where_embeddings_start():
    torch.manual_seed(0)
    model, vectors = GPT(GPTConfig(**{**SIZES, "d_model": 128})), torch.randn(97, 128)
    plain = model.token_embedding.weight.clone()
    model.reset_parameters(vectors)
    given = model.token_embedding.weight
    assert given.std().item() == pytest.approx(plain.std().item(), rel=0.05)
    centred = given - given.mean(0)
    assert torch.cosine_similarity(centred, vectors - vectors.mean(0)).mean().item() == pytest.approx(0.71, abs=0.05)
    ids, targets = torch.randint(0, 97, (2, 4, 32))
    assert abs(model(ids, targets)[1].item() - math.log(97)) < 0.2


def test_the_parameter_count_is_the_number_of_parameters():
    for kind in EVERY_KIND:
        config = GPTConfig(**kind)
        assert config.parameter_count() == sum(p.numel() for p in GPT(config).parameters())


@pytest.mark.parametrize("prompt", [1, 2, 40, 48])
def test_greedy_generation_takes_the_largest_logit_each_time(prompt):
    model = random_model()
    ids = torch.randint(0, 97, (prompt,)).tolist()
    expected = list(ids)
    while len(expected) < 48:
        expected.append(int(model(torch.tensor([expected]))[0][0, -1].argmax()))
    assert list(model.generate(ids, 48 - prompt)) == expected[prompt:]


def test_generation_goes_on_past_the_context_from_its_newest_half():
    model = random_model()
    ids = list(range(10))
    ids += model.generate(ids, 90)
    assert len(ids) == 100
    assert ids[49] == int(model(torch.tensor([ids[25:49]]))[0][0, -1].argmax())
    assert len(list(model.generate(list(range(90)), 5))) == 5  # a prompt longer than the context, too


def test_generation_ends_before_a_stop_id_and_repeats_with_its_seed():
    model = random_model()
    free = list(model.generate([1, 2], 30, temperature=1.0, top_k=20, top_p=0.9, seed=7))
    assert free == list(model.generate([1, 2], 30, temperature=1.0, top_k=20, top_p=0.9, seed=7))
    assert free != list(model.generate([1, 2], 30, temperature=1.0, top_k=20, top_p=0.9, seed=8))
    stopped = list(model.generate([1, 2], 30, temperature=1.0, top_k=20, top_p=0.9, seed=7, stop_ids=[free[9]]))
    assert stopped == free[:free.index(free[9])]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 12), st.floats(0.05, 1.0), st.floats(0.1, 3.0))
def test_a_sampled_id_is_among_the_top_k_and_the_top_p(seed, top_k, top_p, temperature):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(30, generator=generator) * 3
    choice = sample(logits, temperature, top_k, top_p, generator=generator)
    scaled = logits / temperature
    if top_k:
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[-1], -math.inf)
    probability = scaled.softmax(-1)
    assert probability[choice] > 0
    assert probability[probability > probability[choice]].sum() < top_p + 1e-5


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 1.0), (0, 0.8), (5, 0.9), (0, 0.0)])
def test_ids_are_drawn_as_often_as_their_share_of_what_is_kept(top_k, top_p):
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.5, 2.0, -1.0, 1.0, -math.inf, 1.5, 0.0, -0.5])
    share = (logits / 0.8).softmax(-1)
    order = share.argsort(descending=True)
    kept = order[:top_k or len(order)]
    share[order[len(kept):]] = 0
    before = (share[kept].cumsum(0) - share[kept]) / share.sum()
    share[kept[(before >= top_p) & (before > 0)]] = 0
    share /= share.sum()
    draws = 4000
    counts = torch.zeros(8)
    for _ in range(draws):
        counts[sample(logits, 0.8, top_k, top_p, generator=generator)] += 1
    assert ((counts / draws - share).abs() <= 5 * (share * (1 - share) / draws).sqrt()).all()


def test_a_damaged_model_is_told_when_an_id_is_drawn():
    with pytest.raises(InputError, match="not a number"):
        sample(torch.tensor([1.0, math.nan, 2.0]), 0.7)


def test_the_repetition_penalty_lowers_ids_already_seen():
    logits = torch.tensor([2.0, 1.9, -1.0])
    assert sample(logits) == 0
    assert sample(logits, repetition_penalty=1.2, seen=[0]) == 1
    assert logits.tolist() == pytest.approx([2.0, 1.9, -1.0])


# --------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_checkpoint_reads_back_as_it_was(tmp_path, kind):
    model = random_model(**kind)
    prefixed = {f"module._orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    Checkpoint(model.config, prefixed, {"kind": "bytes"}, {"step": 3}).save(tmp_path / "model.pt")
    again = Checkpoint.load(tmp_path / "model.pt")
    ids = torch.randint(0, 97, (2, 9))
    assert torch.equal(again.build_model()(ids)[0], model(ids)[0])
    assert (again.config, again.tokenizer, again.training) == (model.config, {"kind": "bytes"}, {"step": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_checkpoint_is_on_the_disk_before_it_takes_the_place_of_the_last(tmp_path, monkeypatch):
    """Or a power cut right after the rename could leave an empty file and none of the two."""
    model, calls = random_model(), []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: calls.append(name) or real(*a))
    Checkpoint(model.config, model.state_dict(), {}).save(tmp_path / "model.pt")
    assert calls == ["fsync", "replace"]


def test_a_checkpoint_whose_successor_is_never_finished_stays_whole(tmp_path, monkeypatch):
    model = random_model()
    checkpoint = Checkpoint(model.config, model.state_dict(), {})
    checkpoint.save(tmp_path / "model.pt")

    def dies_half_way(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", dies_half_way)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / "model.pt")
    Checkpoint.load(tmp_path / "model.pt").build_model()


@pytest.mark.parametrize("kind", EVERY_KIND[:4])
def test_save_pretrained_reads_back_as_it_was(tmp_path, kind):
    model, ids = random_model(**kind), torch.randint(0, 97, (2, 9))
    model.save_pretrained(tmp_path / "folder")
    assert torch.equal(GPT.from_pretrained(tmp_path / "folder")(ids)[0], model(ids)[0])


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(("change", "words"), [
    (dict(d_model=-1), "d_model must be from 1 to"),
    (dict(n_layer=10**9), "n_layer must be from 1 to"),
    (dict(n_head=True), "n_head must be int, not True"),
    (dict(n_kv_head=3), "n_head 4 must be a multiple of n_kv_head 3"),
    (dict(head_dim=7), "head_dim must be even"),
    (dict(context_length=2**20, head_dim=2**10), "context_length 1048576 with head_dim 1024 is absurd"),
    (dict(norm_eps=float("nan")), "norm_eps nan"),
    (dict(colour="red"), "unknown key 'colour'"),
])
def test_a_config_no_model_can_have_is_refused(change, words):
    with pytest.raises(InputError, match=words.replace("(", r"\(")):
        GPTConfig.from_dict({**SIZES, **change})


def test_a_config_that_lacks_a_key_is_refused():
    with pytest.raises(InputError, match="missing key 'd_ff'"):
        GPTConfig.from_dict({key: value for key, value in SIZES.items() if key != "d_ff"})


def saved(tmp_path, **changes) -> bytes:
    model = random_model()
    path = tmp_path / "good.pt"
    Checkpoint(model.config, model.state_dict(), {}).save(path)
    content = torch.load(path, weights_only=True)
    content.update(changes)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class RunsCode:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def pickled_code() -> bytes:
    buffer = io.BytesIO()
    torch.save({"format": "gpt", "weights": RunsCode()}, buffer, pickle_module=pickle)
    return buffer.getvalue()


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 50_000_000)
    return buffer.getvalue()


@pytest.mark.parametrize(("content", "words"), [
    (lambda tmp: b"", "not a checkpoint, or cut off"),
    (lambda tmp: b"hello", "not a checkpoint, or cut off"),
    (lambda tmp: saved(tmp)[:-2000], "not a checkpoint, or cut off"),
    (lambda tmp: saved(tmp, version=99), "format 99"),
    (lambda tmp: saved(tmp, version=torch.ones(9, 2)), "format tensor"),
    (lambda tmp: saved(tmp, format="other"), "not a checkpoint of train.py"),
    (lambda tmp: saved(tmp, weights=None), "weights or tokenizer are missing"),
    (lambda tmp: saved(tmp, weights={5: torch.zeros(1)}), "weights or tokenizer are missing"),
    (lambda tmp: saved(tmp, weights={"a\nb": torch.zeros(1)}), "weight"),
    (lambda tmp: saved(tmp, config=dict(SIZES, d_model=torch.ones(9, 2))), "d_model must be int, not tensor"),
    (lambda tmp: saved(tmp, config=dict(SIZES, d_model=10**12)), "d_model must be from 1 to"),
    (lambda tmp: saved(tmp, config=dict(SIZES, d_model=2**16, d_ff=2**18)), "does not have the shape"),
    (lambda tmp: saved(tmp, weights={"evil": torch.zeros(1)}), "missing weight"),
    (lambda tmp: saved(tmp, weights={name: tensor.int() for name, tensor in random_model().state_dict().items()}),
     "is not a plain tensor"),
    (lambda tmp: saved(tmp, config=dict(DEEP, context_length=2**20), weights=GPT(GPTConfig(**DEEP)).state_dict()),
     "a context of 1048576 tokens is absurd"),
    (lambda tmp: pickled_code(), "not a checkpoint of train.py, or damaged"),
    (lambda tmp: zip_bomb(), "would unpack to more than its own size"),
])
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path, capsys, content, words):
    path = tmp_path / "bad.pt"
    path.write_bytes(content(tmp_path))
    with pytest.raises(InputError, match=words) as refusal:
        Checkpoint.load(path).build_model()
    assert "\n" not in str(refusal.value)
    assert "must never" not in capsys.readouterr().out


@settings(max_examples=60, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), damage=st.binary(min_size=1, max_size=200))
def test_a_damaged_checkpoint_is_refused_or_reads_as_a_checkpoint(tmp_path_factory, at, damage):
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray(saved(folder))
    start = int(at * len(content))
    content[start:start + len(damage)] = damage
    (folder / "bad.pt").write_bytes(content)
    try:
        Checkpoint.load(folder / "bad.pt").build_model()
    except InputError as refusal:
        assert "\n" not in str(refusal)  # noqa: PT017 - most damage is refused, but not all can be told from weights


def test_a_missing_checkpoint_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        Checkpoint.load(tmp_path / "none.pt")
    with pytest.raises(InputError, match="is a folder"):
        Checkpoint.load(tmp_path)


def test_a_safetensors_header_that_lies_about_its_size_is_refused(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path)
    body = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + body[8:])
    with pytest.raises(InputError, match="not a folder this project wrote"):
        GPT.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    (tmp_path / "model.safetensors").write_bytes(body)
    with pytest.raises(InputError, match="not of this project"):
        GPT.from_pretrained(tmp_path)


def test_a_sequence_longer_than_context_or_cache_is_refused_in_words():
    model = random_model()
    with pytest.raises(ValueError, match="longer than the model's context_length"):
        model(torch.zeros(1, 49, dtype=torch.long))
    cache = KVCache([torch.zeros(1, 2, 4, 8)] * 2, [torch.zeros(1, 2, 4, 8)] * 2)
    with pytest.raises(ValueError, match="longer than the key/value cache"):
        model(torch.zeros(1, 5, dtype=torch.long), None, cache)
    with pytest.raises(InputError, match="prompt is empty"):
        list(model.generate([], 5))
