"""各种格式：一族一个文件，开头写明读哪些写法、凭什么认。进来的是打开的文本，出去的是对话或消息。

读的次序：base（一种格式是什么）、plain、tables、json_values、json_dialogues，然后是各种聊天记录。
"""
