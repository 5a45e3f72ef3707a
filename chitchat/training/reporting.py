"""训练时给用户看的：进度条、日志、TensorBoard、曲线图、示例回复。"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from chitchat.files import atomic_file
from chitchat.training.meters import Reading, TokenAverage

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 10  # 两行进度至少隔这么久


class TrainingLog:
    """训练循环里的进度条、日志和 TensorBoard，用完要 close。"""

    def __init__(self, log_dir: Path | None, *, total_steps: int, first_step: int) -> None:
        """打开记录。

        Args:
            log_dir: TensorBoard 的文件夹；None（不是主进程）时什么也不显示、不写。
            total_steps: 全部更新次数。
            first_step: 断点续训的起点，从头开始是 0。
        """
        self._writer = MetricWriter(log_dir, first_step)
        self._lines = ProgressLines(total_steps, first_step)
        is_hidden = True if log_dir is None else None  # None：不是终端就不显示
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=is_hidden)

    def advance(self) -> None:
        """又做完了一次更新。"""
        self._bar.update()

    def write_step(
        self, step: int, epoch: int, recent: Reading, *, lr: float, grad_norm: float
    ) -> None:
        """最近几步的平均，grad_norm 是最后一步裁剪之前的；epoch 从 1 数。"""
        average = recent.average
        self._lines.report(step, epoch, average, lr=lr)
        self._bar.set_postfix(
            loss=f"{average.loss:.3f}", tokens_per_second=f"{recent.speed:.0f}", refresh=False
        )
        self._writer.write(
            step,
            train_loss=average.loss,
            train_accuracy=average.accuracy,
            train_lr=lr,
            train_grad_norm=grad_norm,
            train_tokens_per_second=recent.speed,
            train_padding=recent.padding,
        )

    def write_epoch(
        self,
        step: int,
        epoch: int,
        average: TokenAverage,
        validation: TokenAverage,
        *,
        lr: float,
        speed: float,
    ) -> None:
        """一轮的结果：一行日志和 TensorBoard 的验证指标；epoch 从 1 数。"""
        self._write_validation(step, validation)
        logger.info(
            "epoch=%d train_loss=%.4f train_acc=%.4f val_loss=%.4f val_ppl=%.2f lr=%.1e "
            "tokens_per_second=%.0f",
            *(epoch, average.loss, average.accuracy, validation.loss, validation.ppl, lr, speed),
        )

    def write_mid_epoch(self, step: int, epoch: int, validation: TokenAverage) -> None:
        """轮中一次验证的结果：一行日志和 TensorBoard 的验证指标；epoch 从 1 数。"""
        self._write_validation(step, validation)
        logger.info(
            "epoch=%d step=%d val_loss=%.4f val_ppl=%.2f",
            *(epoch, step, validation.loss, validation.ppl),
        )

    def _write_validation(self, step: int, validation: TokenAverage) -> None:
        self._lines.restart()
        self._writer.write(
            step,
            val_loss=validation.loss,
            val_ppl=validation.ppl,
            val_accuracy=validation.accuracy,
        )

    def write_samples(self, step: int, text: str) -> None:
        """几句示例回复，Markdown。"""
        self._writer.write_text(step, "samples", text)

    def close(self) -> None:
        """收起进度条，写完 TensorBoard 的缓冲。"""
        self._bar.close()
        self._writer.close()


class MetricWriter:
    """把指标写进 TensorBoard；``log_dir`` 为 None 时什么也不做。

    写不进去（例如磁盘满了）时只提醒一次，此后不再写，训练照常。
    """

    def __init__(self, log_dir: Path | None, first_step: int = 0) -> None:
        """打开记录。

        Args:
            log_dir: TensorBoard 的文件夹，None 表示不写。
            first_step: 断点续训的起点，此前一次运行写下的更晚的点不再显示。
        """
        self._writer = None
        self._threading_hook = threading.excepthook
        if log_dir is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = self._on_thread_error  # 它在后台的线程里写，会留下 traceback
        with self._give_up_on_error():
            self._writer = SummaryWriter(
                str(log_dir), purge_step=first_step + 1 if first_step else None
            )

    def write(self, step: int, **metrics: float) -> None:
        """写一组数；名字里的第一个下划线换成斜线，``train_loss`` 记作 ``train/loss``。"""
        with self._give_up_on_error():
            for name, value in metrics.items():
                if self._writer is not None:
                    self._writer.add_scalar(name.replace("_", "/", 1), value, step)

    def write_text(self, step: int, name: str, text: str) -> None:
        """写一段 Markdown 文字。"""
        with self._give_up_on_error():
            if self._writer is not None:
                self._writer.add_text(name, text, step)

    def close(self) -> None:
        """把缓冲写完。"""
        with self._give_up_on_error():
            if self._writer is not None:
                self._writer.close()
        threading.excepthook = self._threading_hook

    @contextlib.contextmanager
    def _give_up_on_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # 后台线程里的，下一次写时也由这里抛出
            logger.warning("tensorboard stopped: %s", error)
            self._writer = None

    def _on_thread_error(self, error: threading.ExceptHookArgs) -> None:
        if not issubclass(error.exc_type, OSError):
            self._threading_hook(error)


class ProgressLines:
    """进度写成一行日志，最多每 PROGRESS_SECONDS 秒一行；终端上有进度条，就不显示。"""

    def __init__(self, total_steps: int, first_step: int) -> None:
        """开始计时；参数同 TrainingLog。"""
        self._total_steps = total_steps
        self._first_step = first_step
        self._started = time.perf_counter()
        self.restart()

    def restart(self) -> None:
        """重新平均、重新计速：刚才的时间用在了验证和存盘上。"""
        self._recent = TokenAverage()
        self._last = time.perf_counter()

    def report(self, step: int, epoch: int, recent: TokenAverage, *, lr: float) -> None:
        """做完了第 step 次更新，recent 是上次 report 以来的平均；到时候就写一行。"""
        self._recent.merge(recent)
        now = time.perf_counter()
        if now - self._last < PROGRESS_SECONDS:
            return
        rate = (now - self._started) / (step - self._first_step)
        logger.info(
            "epoch=%d step=%d loss=%.4f lr=%.1e tokens_per_second=%.0f minutes_left=%.0f",
            *(epoch, step, self._recent.loss, lr),
            self._recent.num_tokens / max(now - self._last, 1e-9),
            rate * (self._total_steps - step) / 60,
            extra={"is_progress": True},
        )
        self.restart()


def save_loss_curve(path: Path, train_losses: Sequence[float], val_losses: Sequence[float]) -> bool:
    """画出每轮的训练和验证 loss；没有安装 matplotlib 时不画，返回是否画了。"""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    epochs = range(1, len(train_losses) + 1)
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(epochs, train_losses, marker="o", label="train/loss")
    axes.plot(epochs, val_losses, marker="o", label="val/loss")
    axes.set(xlabel="epoch", ylabel="loss (nat per token)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    pyplot.close(figure)
    return True
