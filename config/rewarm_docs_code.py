out_dir = 'out/rewarm_docs_code'
init_from = 'config/pretrain_docs.py'
train_data = {'code': 1.0}
replay_data = {'docs': 1.0}
replay = 0.05
val_data = ['docs', 'code']
max_steps = 600
