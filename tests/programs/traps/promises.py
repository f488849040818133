"""Every refusal that the README promises, with the tests that hold it. This file is a table and imports nothing."""

from __future__ import annotations

# What the README's table says is left to Inductor, clause by clause.
LEFT: dict[str, list[str]] = {
    "weights that are not `[V, D]`": [
        "test_a_weight_for_every_position_is_left_alone", "test_a_weight_of_three_dimensions_is_left_alone",
    ],
    "float64 and integer products": ["test_a_product_in_another_dtype_is_left_alone"],
    "writes that another name sees": [
        "test_an_in_place_step_on_a_view_of_the_logits_is_left_alone",
        "test_an_in_place_step_seen_through_an_older_view_is_left_alone",
    ],
    "classes that are set to NaN": ["test_classes_that_are_set_to_nan_are_left_alone"],
    "views that mix tokens and classes": [
        "test_a_view_that_mixes_tokens_and_classes_is_left_alone", "test_a_view_that_splits_the_classes_is_left_alone",
    ],
    "steps along the vocabulary": ["test_rows_in_another_order_are_right_and_classes_are_left_alone"],
    "labels of another shape or dtype than eager code takes": [
        "test_labels_that_do_not_fit_raise_as_in_eager_code", "test_labels_of_32_bits_raise_as_in_eager_code",
    ],
    "ops that run over tokens, or mix tokens and classes": ["test_what_mixes_the_logits_of_tokens_is_left_alone"],
    "pieces that something else reads or writes to": ["test_pieces_with_a_life_of_their_own_come_out_right"],
    "logits, or what they are made of, that are written later": [
        "test_logits_returned_and_then_changed_in_place_are_returned_changed",
        "test_hidden_states_changed_after_the_loss_are_not_needed_by_a_frozen_weight",
    ],
    "inside `torch.func` transforms": ["test_a_head_inside_a_function_transform_is_left_with_a_sentence"],
    "DTensor and other tensor subclasses": [
        "test_a_distributed_weight_is_right_fused_or_not", "test_a_weight_that_is_a_tensor_subclass_is_left_alone",
    ],
    "where hidden states, weight or labels are written between the projection and the loss": [
        "test_a_hidden_state_changed_after_the_projection_is_not_read_again",
        "test_a_weight_changed_after_the_projection_is_not_read_again",
        "test_labels_written_into_between_two_losses_are_two_sets_of_labels",
    ],
    "smaller heads, and such as would hold more than their logits": ["test_a_tiny_head_is_left_alone_unless_asked_for"],
    "each call decides where tokens are a symbol": ["test_the_limit_decides_at_run_time_whatever_the_budget"],
    "`fusedhead.min_logits` moves the limit": ["test_a_tiny_head_is_left_alone_unless_asked_for"],
}  # fmt: skip
