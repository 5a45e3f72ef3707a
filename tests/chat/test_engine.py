"""推理引擎与 transformers 的模型算同一个函数。"""

import itertools

import pytest
import torch
from transformers import GPT2LMHeadModel

from chitchat.chat.engine import Engine, choose_precision
from chitchat.chat.layers import Int8Linear
from chitchat.chat.loading import load_engine
from chitchat.errors import UserError


def build(model: GPT2LMHeadModel, precision: str = "fp32") -> Engine:
    return Engine(model.config.to_dict(), model.state_dict(), precision=precision)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"activation_function": "relu"},
        {"activation_function": "gelu"},
        {"activation_function": "tanh"},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
    ],
)
def test_logits_equal_transformers_token_by_token(make_model, fields):
    model = make_model(initializer_range=0.5, **fields).eval()
    engine = build(model)
    input_ids = torch.randint(104, model.config.vocab_size, (2, 12))
    with torch.inference_mode():
        expected = model(input_ids).logits
    cache = engine.new_cache(2, 12)
    parts = [engine.hidden(input_ids[:, :5], cache)]
    parts += [engine.hidden(input_ids[:, i : i + 1], cache) for i in range(5, 12)]
    torch.testing.assert_close(
        engine.logits(torch.cat(parts, dim=1)), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("cuts", [(5, 9), (1, 2), (3,), (11,), (4, 5, 6), (2, 7)])
def test_several_tokens_on_a_filled_cache_equal_a_full_forward(make_model, cuts):
    model = make_model(initializer_range=0.5).eval()
    engine = build(model)
    input_ids = torch.randint(104, model.config.vocab_size, (2, 12))
    with torch.inference_mode():
        expected = model(input_ids).logits
    whole = engine.logits(engine.hidden(input_ids, engine.new_cache(2, 12)))
    cache = engine.new_cache(2, 12)
    borders = [0, *cuts, 12]
    parts = [engine.hidden(input_ids[:, a:b], cache) for a, b in itertools.pairwise(borders)]
    logits = engine.logits(torch.cat(parts, dim=1))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_groups_of_any_length_do_not_touch_one_another(make_model, precision):
    """一组送开头，一组送几个 token，一组送一个：各自与单独送入相同，int8 逐位相同。"""
    model = make_model(n_embd=64, n_head=4, initializer_range=0.5).eval()
    engine = build(model, precision)
    rows = [
        torch.randint(104, model.config.vocab_size, shape) for shape in [(1, 9), (3, 7), (2, 5)]
    ]
    starts = [0, 4, 4]
    alone, together = [], []
    for states, is_together in ((alone, False), (together, True)):
        caches = [engine.new_cache(*row.shape) for row in rows]
        for row, cache, start in zip(rows, caches, starts, strict=True):
            if start:
                engine.hidden(row[:, :start], cache)
        groups = [(r[:, s:], c) for r, c, s in zip(rows, caches, starts, strict=True)]
        if is_together:
            states += engine.hidden_groups(groups)
        else:
            states += [engine.hidden(*group) for group in groups]
    for one, other in zip(alone, together, strict=True):
        if precision == "int8":
            assert torch.equal(one, other)
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_int8_linear_is_within_its_rounding_error_and_ignores_the_other_rows():
    weight, bias = torch.randn(40, 32), torch.randn(40)
    x = torch.randn(1, 6, 32) * torch.tensor([0.01, 1, 100, 1, 5, 0])[:, None]
    linear = Int8Linear(weight, bias)
    together = linear(x)
    # 每个积的误差：激活半格 × |权重| 加 权重半格 × |激活|。
    step_x = x.abs().amax(dim=-1, keepdim=True) / 63 / 2
    step_w = weight.abs().amax(dim=1) / 127 / 2
    bound = step_x * weight.abs().sum(dim=1) + (x.abs() + step_x).sum(-1, keepdim=True) * step_w
    assert ((together - (x @ weight.T + bias)).abs() <= bound + 1e-4).all()
    for i in range(6):
        torch.testing.assert_close(linear(x[:, i : i + 1])[:, 0], together[:, i])


def test_int8_model_stays_close_to_float32(make_model):
    model = make_model(n_embd=64, n_head=4).eval()
    input_ids = torch.randint(104, model.config.vocab_size, (1, 30))
    with torch.inference_mode():
        expected = model(input_ids).logits
    engine = build(model, "int8")
    logits = engine.logits(engine.hidden(input_ids, engine.new_cache(1, 30)))
    assert (logits - expected).norm() / expected.norm() < 0.1


def test_a_standard_folder_and_a_pytorch_bin_give_the_same_engine(make_model, tmp_path):
    model = make_model().eval()
    model.save_pretrained(tmp_path / "safe")
    (tmp_path / "bin").mkdir()
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    input_ids = torch.tensor([[101, 110, 102]])
    results = []
    for name in ("safe", "bin"):
        engine = load_engine(str(tmp_path / name), precision="fp32", device="cpu")
        results.append(engine.logits(engine.hidden(input_ids, engine.new_cache(1, 3))))
    assert torch.equal(*results)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, make_model, tmp_path):
    model = make_model()
    model.transformer.ln_f.bias.data[3] = value
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match=r"/m：权重 transformer\.ln_f\.bias 里有 NaN 或 Inf"):
        load_engine(str(tmp_path / "m"), precision="fp32", device="cpu")


def test_a_damaged_folder_gets_a_sentence(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="不完整"):
        load_engine(str(tmp_path / "m"), precision="fp32", device="cpu")


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_int8_on_cpu_and_bf16_on_a_gpu_that_has_it(has_bf16, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert choose_precision("auto", torch.device("cpu")) == "int8"
    assert choose_precision("auto", torch.device("cuda")) == expected
    with pytest.raises(UserError, match="--no_cuda"):
        choose_precision("int8", torch.device("cuda"))


def test_layers_run_as_torchscript_on_cpu_and_without_it_give_the_same(make_model, monkeypatch):
    model = make_model(n_embd=64, n_head=4).eval()
    input_ids = torch.randint(104, model.config.vocab_size, (2, 9))
    results = []
    for is_scripted in (True, False):
        if not is_scripted:
            monkeypatch.setattr(torch.jit, "script", lambda _: (_ for _ in ()).throw(RuntimeError))
        engine = build(model, "int8")
        assert isinstance(engine._blocks, torch.jit.ScriptModule) == is_scripted
        cache = engine.new_cache(2, 9)
        parts = [engine.hidden(input_ids[:, :6], cache)]
        parts += [engine.hidden(input_ids[:, i : i + 1], cache) for i in range(6, 9)]
        results.append(engine.logits(torch.cat(parts, dim=1)))
    torch.testing.assert_close(*results)
