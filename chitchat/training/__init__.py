"""token 表 → 权重：进来的是编码好的对话和一个模型，出去的是一轮轮的检查点和训练状态。

读的次序：dataset 和 batching（成批）、loss（损失）、optimizers、updater（更新）、meters（衡量）、
processes（多卡多进程）、state（续训）、reporting（进度与曲线）。
"""
