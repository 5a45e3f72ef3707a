"""模型文件夹里的 README.md：这是什么模型，在什么上训练，学到了哪里，怎样用。"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

CARD = """\
---
language: zh
library_name: transformers
pipeline_tag: text-generation
---

# 中文闲聊模型

GPT-2 结构，由 gpt2-chitchat 训练：{n_layer} 层、{n_head} 头、{n_embd} 维，
{n_positions} 个位置，词表 {vocab_size:,} 项。
一段对话写成 `[CLS]第一句[SEP]第二句[SEP]…`，聊天模板（chat_template.jinja）就是这样写的。

## 训练

| 项 | 值 |
| --- | --- |
{settings}

## loss

每个 token 多少 nat；PPL 是 exp(验证 loss)。

| 轮 | 训练 | 验证 | PPL |
| --: | --: | --: | --: |
{losses}

## 用法

```bash
python interact.py --model_path 这个文件夹
transformers serve 这个文件夹
```

```python
from transformers import pipeline

chat = pipeline("text-generation", model="这个文件夹")
print(chat([{{"role": "user", "content": "你好"}}])[0]["generated_text"][-1]["content"])
```
"""


def describe_model(
    config: Mapping[str, int],
    settings: Mapping[str, object],
    train_losses: Sequence[float],
    val_losses: Sequence[float],
) -> str:
    """写出 README.md 的内容。

    Args:
        config: config.json 的字段。
        settings: 训练的设定和语料的数目，名字到值。
        train_losses: 已完成各轮的训练 loss，nat 每 token。
        val_losses: 已完成各轮的验证 loss，长度与 train_losses 相同；都是空的就是还在第一轮里。
    """
    rows = [
        f"| {epoch} | {train:.4f} | {val:.4f} | {math.exp(min(val, 700)):.2f} |"
        for epoch, (train, val) in enumerate(zip(train_losses, val_losses, strict=True), 1)
    ]
    return CARD.format(
        **{name: config[name] for name in ("n_layer", "n_head", "n_embd", "n_positions")},
        vocab_size=config["vocab_size"],
        settings="\n".join(f"| {name} | {value} |" for name, value in settings.items()),
        losses="\n".join(rows) or "| 第一轮还没有做完 | | | |",
    )
