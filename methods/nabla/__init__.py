"""∇-GFlowNet: finetuning by detailed balance, differentiated in the states."""
