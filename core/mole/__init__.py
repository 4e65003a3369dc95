"""MoLE: several LoRAs kept separate, and mixed by gates while the model runs (arXiv:2404.13628).

With ``F`` a part of the model, ``F_i`` the same part with LoRA `i`, ``E_i(x) = F_i(x) - F(x)`` is expert `i`'s output:

- gate input, ``E_1(x) .. E_N(x)`` concatenated and normalised, eq. 5: `gate_inputs`, in rank space `stack`;
- gates, ``g = softmax(logits / tau)`` with a learnable ``e`` and ``tau``, section 3.2: `gates`;
- mixing, ``O(x) = F(x) + sum_i g_i E_i(x)``, eq. 5 to 8: per layer `stack` (delta), per block `block_mixing` (output);
- the part of the model that one gate rules, Table 9: `scopes`;
- balance loss, ``L_balance = -log prod_i q_i``, eq. 10 and 11: `gates.balance_loss`; training: `core.train`;
- masking, experts switched off without retraining, section 3.3: `Mixture.only`, `GateSet.select`.

`mixture` holds experts and gates, `bank` stacks them for one model, `attach` replaces the model's forward methods
(`forwards`), and `gate_values` holds the gates' values during a forward pass. `guidance` and `texts` treat negative
prompts and language models, `recompute` saves memory in training, `record` and `freeze` turn a run into one LoRA,
`router` makes gates without training, and `trained` is the file format of gates.
"""
