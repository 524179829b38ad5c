import torch

from hf_qat.graph.capture.labelled import LabelSize, resize_labels


CPU = torch.device("cpu")


def test_objects_are_repeated_or_cut_and_what_describes_the_image_stays():
    labels = [
        {"class_labels": torch.tensor([4, 5]), "boxes": torch.rand(2, 4), "orig_size": torch.tensor([7, 8, 9])},
        {"class_labels": torch.tensor([1]), "boxes": torch.rand(1, 4), "orig_size": torch.tensor([3, 3, 3])},
    ]
    found = resize_labels({"labels": labels}, LabelSize(3, (5, 1)), CPU)["labels"]
    assert [label["class_labels"].tolist() for label in found] == [[4, 5, 4, 5, 4], [1], [4, 5, 4, 5, 4]]
    assert torch.equal(found[0]["boxes"], labels[0]["boxes"][[0, 1, 0, 1, 0]])
    assert [label["orig_size"].tolist() for label in found] == [[7, 8, 9], [3, 3, 3], [7, 8, 9]]


def test_masks_and_classes_in_two_lists_keep_in_step():
    labels = {
        "mask_labels": [torch.rand(2, 4, 4), torch.rand(3, 4, 4)],
        "class_labels": [torch.arange(2), torch.arange(3)],
    }
    found = resize_labels(labels, LabelSize(2, (3, 2)), CPU)
    assert [len(x) for x in found["mask_labels"]] == [len(x) for x in found["class_labels"]] == [3, 2]


def test_an_image_without_objects_gets_boxes_in_its_middle():
    found = resize_labels(
        {"labels": [{"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}]},
        LabelSize(1, (2,)),
        CPU,
    )
    assert found["labels"][0]["boxes"].tolist() == [[0.5] * 4] * 2
    assert found["labels"][0]["class_labels"].tolist() == [0, 0]


def test_tensors_follow_the_batch_and_rows_may_grow():
    labels = {"labels": torch.tensor([[1, 2], [3, 4]])}
    assert resize_labels(labels, LabelSize(3), CPU)["labels"].tolist() == [[1, 2], [3, 4], [1, 2]]
    assert resize_labels(labels, LabelSize(1, longer=1), CPU)["labels"].tolist() == [[1, 2, 1]]


def test_what_is_resized_is_a_copy():
    labels = {"labels": [{"class_labels": torch.tensor([4, 5]), "boxes": torch.rand(2, 4)}]}
    resize_labels(labels, LabelSize(1, (2,)), CPU)["labels"][0]["boxes"].zero_()
    assert labels["labels"][0]["boxes"].abs().sum() > 0
