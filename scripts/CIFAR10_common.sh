# Sourced by the CIFAR10_*.sh sweeps: classes START..END (0..9), data below DATA_PATH, run folders below LOG_ROOT,
# the flags that all four commands share, and the names of the run folders of class $1.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python} START=${START:-0} END=${END:-9} LOG_ROOT=${LOG_ROOT:-./logs}

shared=(--dataset cifar10 --data_path "${DATA_PATH:-../Data/}" --model resnet18 --simclr_dim 512
    --shift_trans_type rot_bmix --mix_alpha 0.2 --log_root "$LOG_ROOT")
# Draws and dictionary as evaluation and t-SNE look at them.
looks=(--ood_score CSI_sr --ood_samples 10 --resize_factor 0.54 --resize_fix
    --sr_lambda 1e-3 --sr_dict_size 512 --invert_sr_feature_norm)

stage1_run() {
    echo "$LOG_ROOT/cifar10_resnet18_unsup_simclr_CSI_shift_rot_bmix_one_class_$1_f512_mix82"
}
stage2_run() {
    local settings=cocsr_ld0.001_lr0.001_invf
    echo "$LOG_ROOT/cifar10_resnet18_unsup_cocsr_dict_shift_rot_bmix_${settings}_one_class_$1_f512_mix82_dm1_init"
}
