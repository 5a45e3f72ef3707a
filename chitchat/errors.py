"""用户能自己改正的错误，和进程的退出码。"""

import re

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """用户能自己改正的错误；内容是一句中文：什么、在哪里、发现了什么、怎么改。"""

    def __init__(self, sentence: str) -> None:
        """别的库的话夹在里面时，其中的换行成了空格。"""
        super().__init__(re.sub(r"\s*\n\s*", " ", sentence))
