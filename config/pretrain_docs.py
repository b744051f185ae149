out_dir = 'out/pretrain_docs'
train_data = {'docs': 1.0}
val_data = ['docs', 'code']
max_steps = 1000
