"""文字 ↔ token id：进来的是对话的文字和词表，出去的是 train.pkl 或可映射进内存的 token 表。

读的次序：vocabulary（默认词表）、tokenizer（文字与 id 互换）、batch_encoder（整批编码）、
token_writer 和 token_table（写表、读表）、vocabulary_learning（由语料学词表）。
"""
