"""权重加历史 → 回复：进来的是模型文件夹和说过的话，出去的是一句回复。

读的次序：options（旋钮），layers、engine、loading（推理），sampling、generation（token 的迭代器），
context、scoring、candidates、chatbot（历史 → 文字的迭代器）；然后是用它的 terminal（终端）、
whole_files（整个文件）、web（服务器）、samples（训练途中）。
"""
