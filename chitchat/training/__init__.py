"""token 表 → 权重：进来的是编码好的对话和一个模型，出去的是一轮轮的检查点和训练状态。

读的次序：pieces（切块）、dataset、batching、loaders（成批），loss、optimizers、optimizer_choice，updater（一次更新）和它外面的两层：
splitting（放不下就拆开）、gradient_sync（多进程），plan（开始时的安排），meters（衡量），run、state（存下与接上），
run_folder，reporting。
"""
