"""对话速度：参考实现的循环、generate、CTranslate2、llama.cpp 与本项目，同一个随机的 12 层模型。

用法: ``python -m tests.benchmarks.chat_speed [--rounds 15]``，没有装的就跳过。各家各在一个进程里，
线程互不干扰；轮流各答一句，机器忙闲对谁都一样。上下文 40 个 token，回复固定 25 个 token。
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessorList
from transformers.generation import SuppressTokensLogitsProcessor, TopKLogitsWarper
from transformers.generation.streamers import BaseStreamer

from chitchat.chat.engine import Engine
from chitchat.chat.generation import Generator, Row
from chitchat.chat.options import SamplingOptions
from chitchat.tokens.tokenizer import SpecialIds

ROOT = Path(__file__).resolve().parent.parent.parent
CONTEXT_LEN, REPLY_LEN, TOP_K = 40, 25, 8
IDS = SpecialIds(pad=0, unk=100, cls=101, sep=102)
FORBIDDEN = list(range(104))  # [SEP] 也禁止，回复因此总是 25 个 token
OURS = "本项目 int8"
SETTLE_SECONDS = 0.3  # 上一家的线程还会空转一阵，等它们歇下
Reply = Callable[[list[int], Callable[[], None]], object]  # (上下文, 每个 token 后的回调)


def reference_loop(model: GPT2LMHeadModel) -> Reply:
    """参考实现：每个 token 重算整个上下文，不关梯度。"""

    def reply(context: list[int], tick: Callable[[], None]) -> None:
        token_ids = list(context)
        for _ in range(REPLY_LEN):
            logits = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0, -1]
            logits[FORBIDDEN] = -torch.inf
            logits[logits < logits.topk(TOP_K)[0][-1]] = -torch.inf
            token_ids.append(int(torch.multinomial(logits.softmax(-1), 1)))
            tick()

    return reply


def generate_loop(model: GPT2LMHeadModel) -> Reply:
    """transformers 的 generate，float32，带缓存。"""

    class Ticker(BaseStreamer):
        def __init__(self, tick: Callable[[], None]) -> None:
            self.tick, self.is_context = tick, True

        def put(self, value: object) -> None:
            if not self.is_context:
                self.tick()
            self.is_context = False

        def end(self) -> None:
            pass

    processors = LogitsProcessorList([SuppressTokensLogitsProcessor(FORBIDDEN)])
    processors.append(TopKLogitsWarper(TOP_K))

    def reply(context: list[int], tick: Callable[[], None]) -> None:
        input_ids = torch.tensor([context])
        with torch.inference_mode():
            model.generate(
                input_ids, attention_mask=torch.ones_like(input_ids), do_sample=True, top_k=0,
                max_new_tokens=REPLY_LEN, eos_token_id=None, pad_token_id=0,
                logits_processor=processors, streamer=Ticker(tick),
            )  # fmt: skip

    return reply


def our_loop(model: GPT2LMHeadModel, precision: str) -> Reply:
    engine = Engine(model.config.to_dict(), model.state_dict(), precision=precision)
    generator, options = Generator(engine, IDS, FORBIDDEN), SamplingOptions(max_len=REPLY_LEN)

    def reply(context: list[int], tick: Callable[[], None]) -> None:
        for _ in generator.tokens(Row(context, options, random.Random(0))):
            tick()

    return reply


def ctranslate2_loop(model: GPT2LMHeadModel, directory: Path) -> Reply:
    """CTranslate2，int8。"""
    import ctranslate2
    from ctranslate2.converters.transformers import GPT2Loader

    model.config.activation_function = "gelu_new"  # 与 gelu_pytorch_tanh 是同一个函数
    spec = GPT2Loader().get_model_spec(model)
    names = [f"t{i}" for i in range(model.config.vocab_size)]
    spec.register_vocabulary(names)
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = names[101:104]
    spec.validate()
    spec.optimize(quantization="int8")
    directory.mkdir()
    spec.save(str(directory))
    generator = ctranslate2.Generator(
        str(directory), compute_type="int8", intra_threads=torch.get_num_threads()
    )

    def reply(context: list[int], tick: Callable[[], None]) -> None:
        generator.generate_batch(
            [[names[i] for i in context]], max_length=REPLY_LEN, min_length=REPLY_LEN,
            sampling_topk=TOP_K, include_prompt_in_result=False,
            callback=lambda _: bool(tick()),
        )  # fmt: skip

    return reply


def write_gguf(model: GPT2LMHeadModel, path: Path) -> None:
    """q8_0 的 GGUF，不带词表。"""
    import gguf
    import numpy as np

    config = model.config
    writer = gguf.GGUFWriter(str(path), "gpt2")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    parts = {
        "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    }  # fmt: skip
    tensors = {"token_embd.weight": "wte.weight", "position_embd.weight": "wpe.weight"}
    tensors |= {f"output_norm.{kind}": f"ln_f.{kind}" for kind in ("weight", "bias")}
    for i in range(config.n_layer):
        for ours, theirs in parts.items():
            for kind in ("weight", "bias"):
                tensors[f"blk.{i}.{theirs}.{kind}"] = f"h.{i}.{ours}.{kind}"
    state = model.transformer.state_dict()
    for name, key in tensors.items():
        tensor = state[key]
        is_linear = key.startswith("h.") and tensor.dim() == 2
        array = np.ascontiguousarray((tensor.T if is_linear else tensor).float().numpy())
        if array.ndim == 2 and name != "position_embd.weight":
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_loop(model: GPT2LMHeadModel, path: Path) -> Reply:
    """llama.cpp，q8_0；llama-cpp-python 的底层接口，采样用 llama.cpp 自己的 top-k。"""
    import ctypes

    import llama_cpp as ll

    write_gguf(model, path)
    ll.llama_backend_init()
    silent = ll.llama_log_callback(lambda *_: None)
    ll.llama_log_set(silent, ctypes.c_void_p(0))
    handle = ll.llama_model_load_from_file(str(path).encode(), ll.llama_model_default_params())
    params = ll.llama_context_default_params()
    params.n_ctx = 256
    params.n_threads = params.n_threads_batch = torch.get_num_threads()
    context_handle = ll.llama_init_from_model(handle, params)
    sampler = ll.llama_sampler_chain_init(ll.llama_sampler_chain_default_params())
    ll.llama_sampler_chain_add(sampler, ll.llama_sampler_init_top_k(TOP_K))
    ll.llama_sampler_chain_add(sampler, ll.llama_sampler_init_dist(0))

    def decode(tokens: list[int]) -> int:
        array = (ll.llama_token * len(tokens))(*tokens)
        if ll.llama_decode(context_handle, ll.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        return ll.llama_sampler_sample(sampler, context_handle, -1)

    def reply(context: list[int], tick: Callable[[], None]) -> None:
        ll.llama_memory_clear(ll.llama_get_memory(context_handle), True)
        token = decode(context)
        tick()
        for _ in range(REPLY_LEN - 1):
            token = decode([token])
            tick()

    reply.keep = silent
    return reply


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


LOOPS: dict[str, Callable[[GPT2LMHeadModel, Path], Reply]] = {
    "参考实现的循环 fp32": lambda model, _: reference_loop(model),
    "generate fp32": lambda model, _: generate_loop(model),
    "本项目 fp32": lambda model, _: our_loop(model, "fp32"),
    "CTranslate2 int8": lambda model, folder: ctranslate2_loop(model, folder / "ct2"),
    "llama.cpp q8_0": lambda model, folder: llama_cpp_loop(model, folder / "model.gguf"),
    OURS: lambda model, _: our_loop(model, "int8"),
}


def build_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(**json.loads((ROOT / "model" / "config.json").read_text("utf-8")))
    config.bos_token_id = config.eos_token_id = None
    return GPT2LMHeadModel(config).eval()


def serve(name: str, pipe: Connection) -> None:
    """子进程：建好一家，先报告有没有装；之后每收到 True 答一句，交回各 token 距开始的秒数。"""
    model = build_model()
    context = torch.randint(104, model.config.vocab_size, (CONTEXT_LEN,)).tolist()
    with tempfile.TemporaryDirectory() as directory:
        try:
            reply = LOOPS[name](model, Path(directory))
        except ImportError:
            pipe.send(False)
            return
        pipe.send(True)
        while pipe.recv():
            ticks: list[float] = []
            start = time.perf_counter()
            reply(context, lambda ticks=ticks: ticks.append(time.perf_counter()))
            assert len(ticks) == REPLY_LEN, (name, len(ticks))
            pipe.send([tick - start for tick in ticks])


def measure_replies(rounds: int) -> None:
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name in LOOPS:
        pipe, other = spawn.Pipe()
        spawn.Process(target=serve, args=(name, other), daemon=True).start()
        if pipe.recv():
            pipes[name] = pipe
    times: dict[str, list[list[float]]] = {name: [] for name in pipes}
    for round_number in range(-2, rounds):
        for name, pipe in pipes.items():
            if "参考" in name and round_number % 3:
                continue
            time.sleep(SETTLE_SECONDS)
            pipe.send(True)
            ticks = pipe.recv()
            if round_number >= 0:
                times[name].append(ticks)
    for pipe in pipes.values():
        pipe.send(False)

    def milliseconds(name: str, token: int, share: float) -> float:
        return 1000 * percentile([ticks[token] for ticks in times[name]], share)

    print("| 做法 | token/s | 首字 ms | 其 95% | 整句 ms | 其 95% | 本项目 int8 快 |")
    print("| --- | --: | --: | --: | --: | --: | --: |")
    for name in pipes:
        median = milliseconds(name, -1, 0.5)
        cells = [
            f"{1000 * REPLY_LEN / median:.1f}",
            *(f"{milliseconds(name, t, p):.0f}" for t in (0, -1) for p in (0.5, 0.95)),
            f"{median / milliseconds(OURS, -1, 0.5):.2f} ×",
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def measure_limit(model: GPT2LMHeadModel) -> None:
    """每个 token 都要把 int8 的权重读一遍：读同样大的一块内存，全部线程一起，要多久。

    用同样大的一块，因为它若放得进缓存，权重也放得进。
    """
    state = model.state_dict()
    num_weights = sum(
        w.numel() for name, w in state.items() if w.dim() == 2 and "wpe" not in name
    ) - state["lm_head.weight"].numel()  # fmt: skip
    data = torch.ones(num_weights // 4)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - start)
    rate = data.nbytes / min(times)
    print(f"int8 权重 {num_weights / 1e6:.0f} MB；同样大的一块 {torch.get_num_threads()} 个线程"
          f"最快 {rate / 1e9:.1f} GB/s，至多 {rate / num_weights:.0f} token/s")  # fmt: skip


def measure_batches(model: GPT2LMHeadModel, num_dialogues: int) -> None:
    """整个文件的成批回答与一句一句地答，上下文 10 到 40 个 token，都是 int8。"""
    engine = Engine(model.config.to_dict(), model.state_dict(), precision="int8")
    generator, options = Generator(engine, IDS, FORBIDDEN), SamplingOptions(max_len=REPLY_LEN)
    rng = random.Random(0)
    contexts = sorted(
        (
            [101, *rng.choices(range(104, 13317), k=rng.randint(9, 39))]
            for _ in range(num_dialogues)
        ),
        key=len,
    )
    seconds = {}
    for size in (1, 16, 32, 64):
        rows = contexts if size > 1 else contexts[:: max(1, num_dialogues // 16)]
        start = time.perf_counter()
        for i in range(0, len(rows), size):
            batch = rows[i : i + size]
            generator.generate([Row(context, options, random.Random(0)) for context in batch])
        seconds[size] = (time.perf_counter() - start) / len(rows)
    for size, each in seconds.items():
        print(f"每批 {size:2d} 段：每句 {1000 * each:.0f} ms，快 {seconds[1] / each:.1f} 倍")


def measure_candidates(rounds: int, model: GPT2LMHeadModel) -> None:
    """五个候选由反向模型挑选，比直接回复慢几倍；上下文 40 个 token，回复至多 25 个。"""
    from chitchat.chat.chatbot import Chatbot
    from chitchat.tokens.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(ROOT / "vocab" / "vocab.txt")
    forward, backward = (
        Engine(model.config.to_dict(), model.state_dict(), precision="int8") for _ in range(2)
    )
    bots = [
        Chatbot(forward, tokenizer),
        Chatbot(forward, tokenizer, backward_engine=backward, num_candidates=5),
    ]
    utterance_len = (CONTEXT_LEN - 1) // 3 - 1
    history = torch.randint(104, model.config.vocab_size, (3, utterance_len)).tolist()
    options = SamplingOptions(max_len=REPLY_LEN)
    times: list[list[float]] = [[], []]
    for round_number in range(-2, rounds):
        for bot, seconds in zip(bots, times, strict=True):
            start = time.perf_counter()
            list(bot.reply(history, options, random.Random(0)))
            if round_number >= 0:
                seconds.append(time.perf_counter() - start)
    plain, ranked = (1000 * percentile(seconds, 0.5) for seconds in times)
    print(f"直接回复 {plain:.0f} ms；5 个候选加反向模型 {ranked:.0f} ms，{ranked / plain:.2f} 倍")


def measure_startup(model: GPT2LMHeadModel) -> None:
    """从敲下命令到出现问候语；旁边是参考实现的 import。"""
    from chitchat.checkpoint import save_checkpoint
    from chitchat.tokens.tokenizer import load_tokenizer

    imports = (
        "import transformers, torch, os, json, random, numpy, argparse\n"
        "from torch.utils.tensorboard import SummaryWriter\n"
        "from tqdm import tqdm\n"
        "from torch.nn import DataParallel\n"
        "from transformers import BertTokenizerFast, GPT2LMHeadModel, GPT2Config\n"
        "import torch.nn.functional as F"
    )
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "model"
        save_checkpoint(checkpoint, model, load_tokenizer(ROOT / "vocab" / "vocab.txt"))
        chat = [
            str(ROOT / "interact.py"), "--no_cuda", "--model_path", str(checkpoint),
            "--log_path", f"{directory}/log", "--save_samples_path", directory,
        ]  # fmt: skip
        ours, replied, theirs = [], [], []
        for _ in range(5):
            start = time.perf_counter()
            with subprocess.Popen(
                [sys.executable, *chat], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as process:
                process.stdout.readline()
                ours.append(time.perf_counter() - start)
                process.stdin.write("你好\n")
                process.stdin.flush()
                process.stdout.readline()
                replied.append(time.perf_counter() - start)
                process.stdin.close()
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", imports], check=True)
            theirs.append(time.perf_counter() - start)
    print(f"问候语 {percentile(ours, 0.5):.2f} s；第一句答完 {percentile(replied, 0.5):.2f} s")
    print(f"参考实现只算 import {percentile(theirs, 0.5):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="每种做法答几句（默认 %(default)s）")
    parser.add_argument("--dialogues", type=int, default=64, help="成批的段数（默认 %(default)s）")
    args = parser.parse_args()
    measure_replies(args.rounds)
    model = build_model()
    measure_limit(model)
    measure_batches(model, args.dialogues)
    measure_candidates(args.rounds, model)
    measure_startup(model)


if __name__ == "__main__":
    main()
