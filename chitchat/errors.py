"""用户能自己改正的错误，和进程的退出码。"""

EXIT_BAD_INPUT = 2


EXIT_INTERRUPTED = 130


class UserError(Exception):
    """用户能自己改正的错误；内容是一句中文：什么、在哪里、发现了什么、怎么改。"""
