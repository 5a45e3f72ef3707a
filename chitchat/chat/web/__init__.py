"""服务器：进来的是 HTTP 请求，出去的是 OpenAI 格式的回复和一张网页；许多人同时聊，一批一起生成。

读的次序：requests（请求体 → 要做的事）、scheduler（排队、一起生成）、choices（token → 文字）、
responses（OpenAI 的格式）、chat_log（聊天记录）、answer（一次回答）、gate（谁可以进来）、
connections（连接的个数和时限）、api（各个地址）、server（端口、信号）；
page.html 是网页，page 把它送出去。
"""
