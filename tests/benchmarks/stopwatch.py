"""训练了多少 token、多少秒；头几秒不算：GPU 上要先载入核函数，与训练的快慢无关。"""

import time

import torch


class Stopwatch:
    """每次更新（或每个小批）之后报一次数；warmup 秒之后才从零开始数，数满 seconds 秒为止。

    Attributes:
        num_tokens: 训练过的 token 数，不含补齐。
        num_padding: 补齐的 token 数。
        elapsed: 数了多少秒。
    """

    def __init__(self, seconds, *, warmup=0.0):
        self.seconds, self.warmup = seconds, warmup
        self._restart()

    def _restart(self):
        self.num_tokens = self.num_padding = 0
        self.elapsed = 0.0
        self._started = time.perf_counter()

    def add(self, num_tokens, num_padding):
        """记下一次更新；返回是否到时间了。GPU 上先等它算完。"""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.num_tokens += num_tokens
        self.num_padding += num_padding
        self.elapsed = time.perf_counter() - self._started
        if self.warmup and self.elapsed >= self.warmup:
            self.warmup = 0.0
            self._restart()
        return not self.warmup and self.elapsed >= self.seconds
