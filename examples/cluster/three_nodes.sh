#!/bin/bash
# Three machines: sh three_nodes.sh HEAD SECOND THIRD PICTURES VAE SHARED
# Each is reached by ssh, has `pip install 'latentpipe[cluster]'`, and mounts SHARED, which PICTURES and VAE lie in.
set -eu
head=$1 second=$2 third=$3 pictures=$4 vae=$5 shared=$6
export RAY_USAGE_STATS_ENABLED=0

ssh "$head" "RAY_USAGE_STATS_ENABLED=0 ray start --head --port 6379 --include-dashboard false"
for node in "$second" "$third"; do
    ssh "$node" "RAY_USAGE_STATS_ENABLED=0 ray start --address $head:6379"
done
ssh "$head" "latentpipe env --cluster $head:6379"

# a worker for each GPU, or for each processor where there are none; given again, it makes what is missing
ssh "$head" "latentpipe encode $pictures --vae $vae --size 256 --shards $shared/latents --workers 24 --cluster $head:6379"

# training: one process for each GPU, here eight on each of the three machines
rank=0
for node in "$head" "$second" "$third"; do
    ssh "$node" "accelerate launch --num_machines 3 --num_processes 24 --machine_rank $rank --main_process_ip $head \
        --main_process_port 29500 --mixed_precision no --dynamo_backend no -m latentpipe train-denoiser $shared/denoiser.yaml \
        --data.cache $shared/latents --data.vae $vae --optim.batch-size 1536" &
    rank=$((rank + 1))
done
wait
for node in "$third" "$second" "$head"; do
    ssh "$node" "ray stop"
done
