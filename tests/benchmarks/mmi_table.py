"""MMI：五段上文各有哪些候选、分数多少、选中哪个；比直接回复慢多少。

用法: python -m tests.benchmarks.mmi_table --model_path model/epoch13 --mmi_model_path 反向模型
相同的候选只算一个，所以一段上文可能不满五个。计时时两种做法轮流，同样的上文、同样的精度。
"""

import argparse
import random
import statistics
import time

import torch

from chitchat.chat.chatbot import Chatbot
from chitchat.chat.engine import MAX_THREADS, choose_precision
from chitchat.chat.loading import load_engine
from chitchat.chat.options import SamplingOptions
from chitchat.checkpoint import load_model_tokenizer
from chitchat.tokens.tokenizer import decode_response, encode_utterances

CONTEXTS = (
    ("你好",),
    ("今天好累啊",),
    ("讲个笑话",),
    ("晚上吃什么好", "天凉，来碗热汤面怎么样？", "不想吃面"),
    ("我养了一只猫", "多大啦", "三个月"),
)
NUM_CANDIDATES = 5


def show_candidates(bot: Chatbot, histories: list[list[list[int]]], options: SamplingOptions):
    """每段上文一张小表；选中的是反向分数最高的，旁边注出只看正向时会选谁。"""
    rng = random.Random(0)
    print("| 上文 | 候选 | 正向 | 反向 | 选中 |\n| --- | --- | --: | --: | --- |")
    for texts, history in zip(CONTEXTS, histories, strict=True):
        context, _ = bot.build_context(history, options)
        candidates = bot.rank_candidates(context, options, rng)
        likeliest = max(candidates, key=lambda candidate: candidate.likelihood)
        for i, candidate in enumerate(candidates):
            notes = ["选中"] if i == 0 else []
            notes += ["正向最高"] if candidate is likeliest else []
            cells = [
                " / ".join(texts) if i == 0 else "",
                decode_response(bot.tokenizer, candidate.token_ids),
                f"{candidate.likelihood:.3f}",
                f"{candidate.backward:.3f}",
                "、".join(notes),
            ]
            print(f"| {' | '.join(cells)} |")


def measure_cost(
    bots: dict[str, Chatbot],
    histories: list[list[list[int]]],
    options: SamplingOptions,
    rounds: int,
) -> None:
    """轮流回答，比中位数。"""
    seconds: dict[str, list[float]] = {name: [] for name in bots}
    for round_number in range(-1, rounds):
        for history in histories:
            for name, bot in bots.items():
                start = time.perf_counter()
                list(bot.reply(history, options, random.Random(0)))
                if round_number >= 0:
                    seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    plain = next(iter(medians.values()))
    print("\n| 做法 | 每句 ms | 倍数 |\n| --- | --: | --: |")
    for name, median in medians.items():
        print(f"| {name} | {1000 * median:.1f} | {median / plain:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", default="model/epoch13")
    parser.add_argument("--mmi_model_path", required=True)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=20, help="每段上文答几次（默认 %(default)s）")
    args = parser.parse_args()
    torch.set_num_threads(min(torch.get_num_threads(), MAX_THREADS))
    device = torch.device("cpu")
    precision = choose_precision("auto", device)
    tokenizer = load_model_tokenizer(args.model_path, None)
    forward, backward = (
        load_engine(path, precision=precision, device=device)
        for path in (args.model_path, args.mmi_model_path)
    )
    picky = Chatbot(forward, tokenizer, backward_engine=backward, num_candidates=NUM_CANDIDATES)
    bots = {
        "直接回复": Chatbot(forward, tokenizer),
        f"{NUM_CANDIDATES} 个候选": Chatbot(forward, tokenizer, num_candidates=NUM_CANDIDATES),
        f"{NUM_CANDIDATES} 个候选加 MMI": picky,
    }
    options = SamplingOptions(temperature=args.temperature)
    histories = [encode_utterances(tokenizer, list(texts)) for texts in CONTEXTS]
    show_candidates(picky, histories, options)
    measure_cost(bots, histories, options, args.rounds)


if __name__ == "__main__":
    main()
