"""人们手里的东西 → 对话：进来的是文件、文件夹、压缩包，出去的是一段段 ``list[str]``。

读的次序：sources、containers、generated、encodings（找到文件、打开、认编码），detection 与 formats/
（认格式、读成对话或消息），times、messages、privacy、sorting、date_order、chat_logs（消息变成对话），cleaning、
reader（逐个来源读出、清洗、筛选），tally、statistics、check（数出来的和报告）。
"""
