"""Every form that must not be rewritten blindly and every trap, by its content, with the tests that hold it.

A form or a trap is held by a test that it is left alone, with its sentence, or that it comes out right: values,
gradients, dtypes. Tests are named without their files; `test_catalogue.py` says if one is missing. This file is a
table and imports nothing.
"""

from __future__ import annotations

# What looks like a language model's loss and is not one projection with one softmax.
FORMS: dict[str, list[str]] = {
    "adaptive, split or tombstone softmax": ["test_an_adaptive_softmax_is_not_seen"],
    "sampled softmax, binary losses on negatives": [
        "test_a_sampled_softmax_is_right", "test_a_binary_loss_on_candidates_is_not_seen",
    ],
    "mixture of softmaxes": ["test_a_mixture_of_softmaxes_is_right"],
    "margin losses": [
        "test_a_margin_on_the_target_logit_is_right",
        "test_an_angular_margin_taken_in_place_without_gradients_is_left_alone",
    ],
    "contrastive losses within a batch": [
        "test_a_contrastive_loss_in_both_directions_is_right", "test_labels_counted_off_by_rank_are_right",
        "test_what_mixes_the_logits_of_tokens_is_left_alone",
    ],
    "a vocabulary split between ranks": [
        "test_a_loss_over_a_vocabulary_split_between_ranks_is_not_seen",
        "test_logits_gathered_from_all_ranks_are_left_alone",
    ],
    "heads that are fused already": ["test_a_head_that_is_fused_already_is_left_alone"],
    "a consumer of the logits that only has a gradient": [
        "test_a_gradient_only_consumer_of_the_logits_is_left_alone",
    ],
    "gradient hooks on logits or head": [
        "test_a_hook_on_the_logits_is_left_alone", "test_logits_that_retain_their_gradient_are_left_alone",
        "test_a_backward_hook_on_the_head_is_not_seen", "test_hooks_on_what_the_head_reads_are_right",
        "test_a_hook_on_the_loss_sees_its_gradient", "test_a_hook_on_the_losses_of_tokens_sees_their_gradients",
    ],
    "an adapter, or a second projection, added to the head": ["test_an_adapter_added_to_the_head_is_right"],
    "terms with token and vocabulary extent": ["test_a_term_with_token_and_vocabulary_extent_is_right"],
    "class masks that depend on the token": [
        "test_a_class_mask_that_depends_on_the_token_is_right", "test_a_filter_on_the_logits_own_size_is_right",
    ],
    "a weight for every position": [
        "test_a_weight_for_every_position_is_left_alone", "test_a_weight_of_three_dimensions_is_left_alone",
    ],
    "classes that are positions": [
        "test_a_span_head_over_positions_is_left_alone",
        "test_classes_left_last_mean_that_positions_are_the_classes",
    ],
    "attention, routers, gates": [
        "test_attention_is_not_a_head", "test_a_log_softmax_over_keys_is_not_a_head", "test_a_router_is_not_a_head",
    ],
    "losses by dynamic programming over frames": ["test_ctc_is_not_seen"],
    "a backward inside the loop over chunks": ["test_a_backward_inside_the_program_is_left_to_dynamo"],
    "function transforms": [
        "test_a_head_inside_a_function_transform_is_left_alone", "test_a_head_under_vmap_is_left_alone",
        "test_a_function_transform_that_ended_before_the_head_does_not_matter",
    ],
    "quantised, eight-bit, distributed and subclass weights": [
        "test_a_weight_that_is_a_tensor_subclass_is_left_alone", "test_a_distributed_weight_is_right_fused_or_not",
        "test_a_projection_that_is_an_op_of_its_own_is_not_seen", "test_a_weight_stored_in_eight_bits_is_right",
        "test_a_sparse_or_complex_weight_is_not_seen", "test_a_product_in_another_dtype_is_left_alone",
    ],
    "head and loss in different graphs": ["test_head_and_loss_in_different_graphs_are_left_alone"],
}  # fmt: skip

# What looks like a match, and where a naive rewrite would be wrong.
TRAPS: dict[str, list[str]] = {
    # outputs, aliases, writes
    "logits are returned beside the loss": ["test_returned_logits_are_returned"],
    "what is returned is not the projection": [
        "test_the_returned_tensor_is_the_one_returned_not_the_projection",
        "test_logits_returned_from_an_autocast_region_are_those_of_eager_code",
        "test_returned_logits_with_columns_that_were_set_are_right",
    ],
    "logits are changed in place": ["test_logits_changed_in_place_by_every_spelling_are_right"],
    "consumers on both sides of a step in place": [
        "test_consumers_on_both_sides_of_an_in_place_step_see_what_they_saw",
    ],
    "a step in place on a view of the logits": [
        "test_an_in_place_step_on_a_view_of_the_logits_is_left_alone",
        "test_an_in_place_step_seen_through_an_older_view_is_left_alone",
    ],
    "an assignment by index has no users": [
        "test_classes_masked_by_assignment_are_masked", "test_an_assignment_into_the_losses_counts",
        "test_an_assignment_into_the_log_probabilities_of_tokens_counts",
        "test_an_assignment_into_the_labels_counts",
    ],
    "logits are changed in place without gradients": [
        "test_a_step_in_place_without_gradients_keeps_its_gradient_trick",
        "test_an_angular_margin_taken_in_place_without_gradients_is_left_alone",
    ],
    "the loss is changed in place": [
        "test_a_loss_that_is_added_to_in_place_is_right", "test_losses_that_are_scaled_in_place_are_right",
        "test_a_loss_kept_under_another_name_sees_what_is_added_in_place",
    ],
    "labels are changed in place": [
        "test_labels_are_read_after_what_is_written_into_them",
        "test_labels_written_into_through_a_view_are_read_afterwards",
        "test_labels_written_into_between_two_losses_are_two_sets_of_labels",
    ],
    "hidden states or weight are changed between head and loss": [
        "test_a_hidden_state_changed_after_the_projection_is_not_read_again",
        "test_a_weight_changed_after_the_projection_is_not_read_again",
        "test_a_weight_changed_before_the_projection_is_read_changed",
        "test_a_layer_that_works_in_place_is_seen_to",
        "test_a_table_whose_rows_are_cut_to_length_is_written_to",
    ],
    "logits are read after the optimizer step, or when their memory is used again": [
        "test_returned_logits_read_after_the_optimizer_step_are_never_those_of_the_new_weight",
        "test_memory_that_was_taken_away_is_never_read", "test_cuda_graphs_are_recognised",
    ],
    "an entry of the output is replaced": [
        "test_an_entry_of_the_output_dictionary_may_be_replaced", "test_an_output_may_be_replaced_by_its_own_cast",
        "test_containers_hand_it_out_as_it_is",
    ],
    # which tensor, which dimension
    "classes in dimension one": ["test_classes_in_dimension_one_are_right", "test_classes_moved_by_einops_are_right"],
    "a loss of three dimensions takes dimension one": [
        "test_classes_left_last_mean_that_positions_are_the_classes",
        "test_classes_left_last_are_positions_even_where_the_sizes_agree",
        "test_a_single_token_has_its_classes_in_dimension_zero",
    ],
    "a softmax over another dimension": [
        "test_a_log_softmax_over_positions_is_left_alone",
        "test_a_softmax_over_dimension_one_of_a_matrix_is_over_the_classes",
    ],
    "a gather along another dimension, or of several labels": [
        "test_several_labels_a_row_are_right", "test_a_gather_along_the_rows_is_left_alone",
        "test_a_second_gather_on_the_picked_log_probabilities_is_no_loss",
        "test_a_gather_of_fewer_rows_is_left_alone",
    ],
    "a view that mixes tokens and classes": [
        "test_a_view_that_mixes_tokens_and_classes_is_left_alone", "test_a_view_that_splits_the_classes_is_left_alone",
        "test_stacked_heads_flattened_together_are_left_alone_or_right",
        "test_the_last_classes_and_the_last_positions_are_told_apart",
    ],
    "span heads, multiple choice, a second small head": [
        "test_a_span_head_over_positions_is_left_alone", "test_choices_scored_by_one_number_each_are_right",
        "test_two_heads_of_very_different_sizes_are_both_right",
    ],
    "loops over rows and chunks, unrolled": [
        "test_a_loop_over_rows_is_right", "test_a_stack_of_rows_own_normalisers_is_right",
        "test_a_mean_of_the_means_of_chunks_is_not_the_mean",
    ],
    "a part of the vocabulary": [
        "test_classes_cut_off_after_the_head_get_no_gradient", "test_rows_cut_off_the_weight_get_no_gradient",
    ],
    # labels and denominators
    "the label to ignore": [
        "test_any_label_can_be_the_one_to_ignore", "test_minus_a_hundred_is_ignored_though_nobody_wrote_it",
    ],
    "labels out of range": ["test_a_label_out_of_range_raises_as_in_eager_code"],
    "five denominators of label smoothing": [
        "test_smoothing_by_pytorch_divides_by_all_classes", "test_smoothing_by_fairseq_divides_by_the_other_classes",
        "test_smoothing_by_prophetnet_takes_nothing_from_the_label",
        "test_smoothing_by_the_annotated_transformer_leaves_out_label_and_padding",
        "test_smoothing_by_speechbrain_is_made_without_gradients", "test_smoothing_of_a_one_hot_target_is_right",
        "test_smoothing_by_timm_takes_the_mean_of_the_log_probabilities",
    ],
    "smoothing over masked classes": [
        "test_smoothing_over_a_masked_class_has_eager_gradients",
        "test_smoothing_over_a_masked_class_is_as_infinite_as_in_eager_code",
    ],
    "every label ignored": [
        "test_an_all_ignored_mean_is_nan_and_an_all_ignored_sum_is_zero",
        "test_a_count_that_is_at_least_one_makes_no_nan",
    ],
    "what a mean divides by": [
        "test_a_z_loss_averages_over_all_tokens_and_the_loss_over_those_that_count",
        "test_a_weighted_mean_divides_by_the_weights_of_the_labels", "test_a_sum_over_an_outside_count_is_right",
    ],
    "a product with a mask is not an ignored label": [
        "test_a_product_with_a_mask_keeps_nan_where_ignoring_does_not", "test_a_softmax_of_what_is_no_number",
    ],
    "labels rolled across rows": ["test_rolled_labels_are_used_as_they_are"],
    "labels shifted by padding or by slicing": [
        "test_labels_shifted_by_padding_are_right", "test_logits_shifted_by_slicing_are_right",
    ],
    "dtype and place of the labels": [
        "test_labels_that_no_compiler_takes_raise", "test_labels_of_eight_bits_are_right",
        "test_labels_of_32_bits_raise_as_in_eager_code", "test_indices_of_32_bits_into_log_probabilities_are_right",
        "test_labels_computed_after_the_projection_are_right",
    ],
    "targets that are probabilities": [
        "test_probabilities_as_targets_are_right", "test_labels_that_do_not_fit_raise_as_in_eager_code",
    ],
    "class weights, and arguments by position": [
        "test_all_eight_positional_arguments_are_read", "test_reductions_of_the_old_arguments_are_read",
        "test_a_weighted_mean_divides_by_the_weights_of_the_labels",
    ],
    "labels made of the logits": [
        "test_labels_drawn_from_the_same_logits_are_right",
        "test_labels_that_a_sort_of_the_logits_gives_are_left_alone",
        "test_random_numbers_drawn_for_every_logit_are_left_alone",
    ],
    # numerics
    "dtypes of results": ["test_low_precision_results_have_eager_dtypes_and_no_larger_errors"],
    "log-probabilities in a low precision, and ratios of them": [
        "test_low_precision_results_have_eager_dtypes_and_no_larger_errors",
        "test_a_policy_and_its_reference_of_the_same_weights_agree_to_the_last_bit",
    ],
    "a cap before or after the cast": ["test_a_cap_before_or_after_the_cast_is_within_eager_errors"],
    "heads in float32": [
        "test_a_float32_head_on_low_precision_operands_is_computed_in_float32",
        "test_a_head_in_float32_within_autocast_stays_in_float32",
    ],
    "decisions on rounded logits": ["test_argmax_is_that_of_the_rounded_logits", "test_ties_go_to_the_first_class"],
    "autocast leaves no casts in the graph": [
        "test_autocast_around_or_inside_has_eager_dtypes", "test_a_loss_outside_the_autocast_region_is_right",
        "test_factors_made_under_autocast_are_as_rounded_as_they_were",
    ],
    "gradients below the range of float16": [
        "test_half_precision_takes_no_gradient_of_a_transform_before_the_loss_scale_is_known",
    ],
    "losses that are not linear in those of the tokens": [
        "test_a_loss_that_is_not_linear_in_the_token_losses_is_recomputed", "test_any_upstream_gradient_is_right",
        "test_an_upstream_gradient_a_token_is_right",
        "test_losses_that_the_program_sorts_or_weighs_by_themselves_are_right",
    ],
    "a z-loss of capped or tempered logits": ["test_the_z_loss_is_that_of_the_node_it_reads"],
    "learned scales, biases without gradient": [
        "test_learned_scales_get_their_gradients", "test_a_temperature_a_token_gets_its_gradient",
        "test_a_bias_is_right_in_every_spelling",
    ],
    "deterministic algorithms": ["test_deterministic_algorithms_are_allowed"],
    # weights
    "a tied weight is one input with two uses": ["test_a_tied_weight_gets_both_gradients"],
    "a weight that the graph computes": [
        "test_a_weight_may_be_any_value_of_the_graph", "test_a_weight_normalised_by_a_parametrisation_is_right",
        "test_a_weight_normalised_by_a_hook_is_right", "test_one_of_many_weights_is_right",
        "test_a_weight_cast_from_another_dtype_gets_its_gradient_in_it",
    ],
    "a weight stored the other way round, or with strides": [
        "test_a_weight_stored_the_other_way_round_is_right", "test_a_weight_with_strides_is_right",
        "test_rows_and_weights_that_are_one_row_expanded_are_right",
    ],
    "hooks and replaced modules": [
        "test_a_forward_hook_on_the_head_is_part_of_it", "test_a_hook_before_the_head_is_part_of_it",
        "test_a_replaced_forward_is_what_is_called",
    ],
    "weights that are no plain tensors": [
        "test_a_weight_that_is_a_tensor_subclass_is_left_alone", "test_a_distributed_weight_is_right_fused_or_not",
    ],
    "frozen parts": ["test_frozen_parts_want_no_gradient", "test_inference_mode_is_right"],
    "shapes of a bias": [
        "test_a_bias_is_right_in_every_spelling", "test_a_bias_that_varies_by_token_in_addmm_is_left_alone",
        "test_a_bias_that_broadcasts_over_the_classes_is_no_bias_of_the_loss_but_of_the_z_loss",
    ],
    # graphs
    "checkpointed heads": [
        "test_a_checkpointed_loss_is_right_and_recomputes",
        "test_a_checkpointed_head_with_the_loss_outside_is_taken_out",
        "test_a_checkpoint_of_more_than_a_head_is_left_alone",
        "test_logits_that_leave_a_checkpointed_region_are_left_alone",
    ],
    "what breaks the graph between head and loss": [
        "test_a_branch_on_data_between_head_and_loss_breaks_the_graph",
        "test_a_number_read_out_between_head_and_loss_breaks_the_graph",
    ],
    "random numbers around the head": [
        "test_dropout_before_the_head_is_drawn_once", "test_losses_that_are_dropped_at_random_are_dropped_once",
        "test_random_factors_drawn_after_the_head_are_drawn_in_order", "test_random_logits_and_rows_are_right",
        "test_random_numbers_drawn_for_every_logit_are_left_alone",
    ],
    "two losses on the same logits": [
        "test_two_losses_on_the_same_logits_are_right", "test_detached_consumers_get_values_and_no_gradient",
    ],
    "sums times zero that keep a parameter alive": [
        "test_a_sum_times_zero_keeps_its_place_in_the_graph", "test_a_sum_over_everything_times_zero_is_right",
    ],
    "vmap and grad in the graph": ["test_a_head_inside_a_function_transform_is_left_with_a_sentence"],
    "a second backward, or a backward of the backward": [
        "test_two_backwards_through_one_loss_agree", "test_double_backward_says_that_it_is_not_supported",
    ],
    "symbolic numbers of tokens": [
        "test_symbolic_token_counts_take_one_graph",
        "test_rows_picked_by_a_mask_on_the_hidden_states_are_right",
        "test_rows_picked_by_a_mask_on_the_logits_are_right",
    ],
    "settings meant for Inductor": ["test_what_is_inductors_reaches_inductor"],
    "a whole step compiled, or its backward": [
        "test_a_train_step_compiled_as_a_whole_is_right", "test_a_backward_that_is_compiled_too_is_right",
        "test_a_compiled_step_that_takes_its_own_gradients_is_right",
    ],
    "walkers over what a model returns": [
        "test_walkers_over_outputs_find_tensors_with_the_right_numbers", "test_distributed_data_parallel",
        "test_converters_of_outputs_keep_it_deferred",
    ],
    "a row that is only there to be dropped": ["test_one_row_more_than_needed_is_dropped"],
    "layers compiled one by one": [
        "test_a_lone_projection_is_left_untouched", "test_inner_layers_of_a_network_are_left_alone",
    ],
    "heads too small to pay": ["test_a_tiny_head_is_left_alone_unless_asked_for"],
}  # fmt: skip
