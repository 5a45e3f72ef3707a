"""损失：在模型副本内部算出 loss 之和、预测的 token 数和猜对的 token 数。

形状记号: B 批内对话数   T 对话的 token 数   M 真正要预测的位置数   C 隐藏宽度   V 词表大小
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from chitchat.training.dataset import IGNORE_INDEX

# 一块 logits 的元素数：CPU 上让一块留在缓存里，GPU 上则要够大才喂得饱矩阵单元。
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP16_SAFE_ROWS = 1024  # fp16 最大只到 65504：输出层的梯度是更多行之和时，先缩小再加


class LinearCrossEntropy(torch.autograd.Function):
    """输出层与交叉熵合在一起分块计算，(M, V) 的 logits 从不整个存在。

    前向时就顺手算出梯度：每块 logits 只算一次，内存与块大小成正比而与 M 无关。
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, with_grad: bool):  # noqa: D102
        compute_weight = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if with_grad else None
        grad_weight = torch.zeros_like(weight) if with_grad else None
        loss_sum = hidden.new_zeros((), dtype=torch.float32)
        num_correct = hidden.new_zeros((), dtype=torch.float32)
        rows = max(1, CHUNK_ELEMENTS.get(hidden.device.type, 2**23) // weight.size(0))
        for start in range(0, len(targets), rows):
            hidden_chunk, target_chunk = hidden[start : start + rows], targets[start : start + rows]
            logits = (hidden_chunk @ compute_weight.T).float()  # (rows, V)
            maximum, prediction = logits.max(dim=-1)
            num_correct += (prediction == target_chunk).sum()
            probs = logits.softmax(dim=-1)
            # log Σexp = 最大的 logits − 它的 log 概率
            log_sum = maximum - probs.gather(1, prediction[:, None]).squeeze(1).log()
            loss_sum += (log_sum - logits.gather(1, target_chunk[:, None]).squeeze(1)).sum()
            if with_grad:
                # d loss / d logits = softmax - onehot
                probs.scatter_add_(1, target_chunk[:, None], -torch.ones_like(log_sum)[:, None])
                grad_logits = probs.to(hidden.dtype)
                grad_hidden[start : start + rows] = grad_logits @ compute_weight
                is_fp16 = hidden.dtype == torch.float16
                excess = len(target_chunk) // FP16_SAFE_ROWS if is_fp16 else 0
                sum_scale = 2.0 ** -excess.bit_length()
                grad_weight.add_(grad_logits.T @ (hidden_chunk * sum_scale), alpha=1 / sum_scale)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(num_correct)
        return loss_sum, num_correct

    @staticmethod
    def backward(ctx, grad_output: Tensor, _: Tensor):  # noqa: D102
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_output, grad_weight * grad_output, None, None


class LossModule(nn.Module):
    """把模型和损失放进同一个 forward，DataParallel 的每块卡因此只交回三个数。

    混合精度也在这里面：autocast 只管当前线程，DataParallel 的每块卡却各有一个线程。
    """

    def __init__(self, model: GPT2LMHeadModel, *, precision: str = "fp32") -> None:
        """precision 是矩阵乘法的精度，PRECISIONS 之一；参数和 loss 总是 float32。"""
        super().__init__()
        self.model = model
        self.dtype = PRECISIONS[precision]

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """对所有真正要预测的位置求和。

        右侧补齐加因果注意力：真实位置看不到补齐，因此不需要 attention mask。

        Args:
            input_ids: 形状 (B, T)。
            labels: 形状 (B, T)；位置 t+1 的值是位置 t 的目标，IGNORE_INDEX 处不计。

        Returns:
            形状 (1, 3)，float32：loss 之和（nat）、预测的 token 数、猜对的 token 数。
        """
        with torch.autocast(input_ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden = self.model.transformer(input_ids=input_ids, use_cache=False).last_hidden_state
        targets = labels[:, 1:]  # (B, T-1)，位置 t 预测第 t+1 个 token
        is_target = targets != IGNORE_INDEX
        hidden, targets = hidden[:, :-1][is_target], targets[is_target]  # (M, C)、(M,)
        # 最后的归一化给出 float32；输出层也要用低精度来乘。
        loss_sum, num_correct = LinearCrossEntropy.apply(
            hidden.to(self.dtype), self.model.lm_head.weight, targets, torch.is_grad_enabled()
        )
        num_tokens = is_target.sum().to(torch.float32)
        return torch.stack([loss_sum, num_tokens, num_correct]).unsqueeze(0)
