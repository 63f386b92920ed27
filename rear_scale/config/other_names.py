"""Names of our fields in other projects: VAR, LlamaGen, 1d-tokenizer (RAR), Hugging Face's Trainer, Lightning, DeepSpeed and
nanoGPT. The error of an unknown key with such a name suggests ours."""

from __future__ import annotations

import re

# Our field -> the other names, in lower case with _ between words.
_NAMES = {
    "run.name": "run_name exp_name experiment_name experiment.name name",
    "run.dir": "output_dir out_dir results_dir result_dir default_root_dir local_out_dir_path save_dir log_dir logdir exp_dir"
    " workdir work_dir experiment.output_dir",
    "run.seed": "seed global_seed random_seed training.seed",
    "model.depth": "n_layer n_layers num_layers num_hidden_layers layers depth num_blocks",
    "model.width": "hidden_size n_embd dim d_model embed_dim hidden_dim embd_dim",
    "model.num_heads": "n_head n_heads num_heads num_attention_heads heads nhead",
    "model.mlp_width": "intermediate_size ffn_dim dim_feedforward mlp_dim ffn_hidden_size",
    "model.num_classes": "num_classes condition_num_classes n_classes nclass n_class class_num",
    "model.dropout": "dropout drop resid_pdrop resid_dropout_p dropout_p hidden_dropout_prob drop_rate",
    "model.attn_dropout": "attn_drop attn_dropout attn_pdrop attn_dropout_p attention_probs_dropout_prob attn_drop_rate",
    "model.kernel": "attn_implementation attention flash_attn fused fuse",
    "tokenizer.name": "vq_model tokenizer_name vae",
    "tokenizer.weights": "vq_ckpt vqvae_ckpt vae_ckpt tokenizer_ckpt tokenizer_checkpoint"
    " pretrained_tokenizer_weight vq_model_path",
    "tokenizer.image_size": "image_size img_size resolution crop_size data_load_reso",
    "tokenizer.num_tokens": "image_seq_len num_latent_tokens block_size seq_len max_seq_len sequence_length",
    "tokenizer.codebook_size": "codebook_size vocab_size target_codebook_size num_embeddings n_embed",
    "tokenizer.codebook_dim": "codebook_dim codebook_embed_dim token_size",
    "data.train": "data_path data_dir train_data train_file train_shards train_shards_path_or_url dataset dataset_name"
    " dataset_path code_path pretokenization",
    "data.val": "val_data val_file val_path eval_data validation_file eval_shards_path_or_url eval_dataset",
    "objective.class_dropout": "class_label_dropout class_dropout class_dropout_prob label_dropout cond_drop_rate cfg_dropout",
    "optim.lr": "learning_rate lr base_lr blr tblr tlr max_lr peak_lr optimizer.lr",
    "optim.end_lr": "min_lr end_lr eta_min final_lr lr_end",
    "optim.warmup_steps": "warmup_steps warmup_iters num_warmup_steps lr_warmup_steps warmup",
    "optim.betas": "betas beta1 beta2 adam_beta1 adam_beta2 adam_betas",
    "optim.weight_decay": "weight_decay wd twd",
    "optim.grad_clip": "max_grad_norm gradient_clip_val gradient_clipping grad_clip tclip clip_grad clip_grad_norm",
    "optim.ema_decay": "ema ema_decay use_ema ema_rate",
    "strategy": "deepspeed fsdp zero_stage zero_optimization parallel_strategy dist_strategy",
    "strategy.cpu_offload": "cpu_offload offload offload_optimizer",
    "train.total_steps": "max_steps max_train_steps max_iters total_steps train_iters num_iters iterations num_train_steps",
    "train.epochs": "epochs num_epochs num_train_epochs max_epochs ep",
    "train.global_batch_size": "global_batch_size batch_size total_batch_size train_batch_size bs",
    "train.micro_batch_size": "micro_batch_size per_device_train_batch_size per_gpu_batch_size per_gpu_train_batch_size"
    " train_micro_batch_size_per_gpu gradient_accumulation_steps accumulate_grad_batches grad_accum_steps ac",
    "train.precision": "precision mixed_precision fp16 bf16 dtype",
    "train.activation_checkpointing": "gradient_checkpointing grad_ckpt use_checkpoint activation_checkpointing remat",
    "train.compile": "compile torch_compile tfast vfast",
    "train.log_every": "logging_steps log_every log_every_n_steps log_interval log_freq print_freq",
    "train.val_every": "eval_steps eval_every eval_interval val_every val_check_interval validation_steps"
    " check_val_every_n_epoch",
    "train.init_from": "init_from init_weight init_checkpoint pretrained finetune gpt_ckpt load_from",
    "checkpoint.every_steps": "save_steps save_every save_interval save_freq ckpt_every checkpoint_interval every_n_train_steps",
    "checkpoint.keep_last": "save_total_limit save_top_k keep_last",
    "sample.num_images": "num_fid_samples num_samples num_sample n_samples num_images",
    "sample.batch_size": "per_proc_batch_size sample_batch_size",
    "sample.temperature": "temperature randomize_temperature temp",
    "sample.top_k": "top_k topk",
    "sample.top_p": "top_p topp",
    "sample.guidance.scale": "cfg cfg_scale guidance_scale guidance",
    "sample.guidance.power": "guidance_scale_pow scale_pow guidance_power",
    "evaluate.batch_size": "eval_batch_size per_device_eval_batch_size",
    "wandb.mode": "report_to use_wandb wandb_mode logger no_wandb",
    "tensorboard.mode": "use_tensorboard tensorboard_mode enable_tensorboard",
    "wandb.project": "wandb_project project project_name",
}
_OURS = {other: ours for ours, others in _NAMES.items() for other in others.split()}


def our_name(name: str) -> str | None:
    """Our field for a key of another project, such as `optim.learning_rate` or `--max-steps`; None for an unknown name."""
    plain = re.sub(r"\W+", ".", name.replace("-", "_")).strip("._").lower()
    return _OURS.get(plain) or _OURS.get(plain.rpartition(".")[2])
