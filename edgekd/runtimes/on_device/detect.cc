// Boxes out of the raw heads of @FILE@, for one image. C++14, nothing else; as detect.py.
#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

struct Level {
  int rows, columns;
  double stride_y, stride_x, offset;
  std::vector<std::pair<double, double>> sizes;  // width and height of each anchor at a location
};

struct Detection {
  float edges[4];  // left, top, right, bottom in pixels of the input
  float score;
  int label;  // its line in labels.txt, from 0 on
};

const std::vector<Level> LEVELS = {
    @LEVELS@};
const std::string BOXES = "@BOXES@";
const int BOX_COLUMNS = @BOX_COLUMNS@, CLASS_COLUMNS = @CLASS_COLUMNS@;  // of the heads
const bool SOFTMAX = @SOFTMAX@, OF_CLASS = @OF_CLASS@;
const int LABELS = CLASS_COLUMNS - SOFTMAX;  // without the background, which is column 0
const float IMAGE[] = {@WIDTH@, @HEIGHT@}, WEIGHTS[] = {@WEIGHTS@}, LARGEST = @LARGEST@;
const float SCORE_THRESHOLD = @SCORE_THRESHOLD@, NMS_THRESHOLD = @NMS_THRESHOLD@;
const size_t CANDIDATES = @CANDIDATES@, DETECTIONS = @DETECTIONS@;

// How far an edge is from its anchor's centre, in sizes of the anchor.
static float distance(const float* raw, int edge) {
  if (BOXES == "log_distance") return std::exp(std::min(raw[edge], LARGEST));
  if (BOXES != "distribution") return raw[edge];
  const int bins = BOX_COLUMNS / 4;
  const float* logits = raw + edge * bins;
  const float largest = *std::max_element(logits, logits + bins);
  float sum = 0, mean = 0;
  for (int bin = 0; bin < bins; ++bin) {
    const float share = std::exp(logits[bin] - largest);
    sum += share;
    mean += share * bin;
  }
  return mean / sum;
}

// `box` is an anchor's four edges, and becomes those of what was found there.
static void decode(const float* raw, float* box) {
  for (int axis = 0; axis < 2; ++axis) {
    const float size = box[axis + 2] - box[axis], centre = (box[axis] + box[axis + 2]) / 2;
    float low, high;
    if (BOXES == "offset") {
      const float middle = centre + raw[axis] / WEIGHTS[axis] * size;
      const float half = std::exp(std::min(raw[axis + 2] / WEIGHTS[axis + 2], LARGEST)) * size / 2;
      low = middle - half, high = middle + half;
    } else {
      low = centre - distance(raw, axis) * size, high = centre + distance(raw, axis + 2) * size;
    }
    box[axis] = std::min(std::max(low, 0.0f), IMAGE[axis]);
    box[axis + 2] = std::min(std::max(high, 0.0f), IMAGE[axis]);
  }
}

static std::vector<Detection> decoded(const float* boxes) {
  std::vector<Detection> found;
  for (const Level& level : LEVELS)
    for (int row = 0; row < level.rows; ++row)
      for (int column = 0; column < level.columns; ++column)
        for (const auto& size : level.sizes) {
          const double y = (row + level.offset) * level.stride_y, half_y = size.second / 2;
          const double x = (column + level.offset) * level.stride_x, half_x = size.first / 2;
          Detection anchor = {{float(x - half_x), float(y - half_y), float(x + half_x),
                               float(y + half_y)}, 0, 0};
          decode(boxes + found.size() * BOX_COLUMNS, anchor.edges);
          found.push_back(anchor);
        }
  return found;
}

static float sigmoid(float x) { return 0.5f * (1 + std::tanh(0.5f * x)); }

// One anchor's scores of all labels.
static void score(const float* classes, const float* quality, float* scores) {
  const float largest = *std::max_element(classes, classes + CLASS_COLUMNS);
  float sum = 0;
  for (int i = 0; SOFTMAX && i < CLASS_COLUMNS; ++i) sum += std::exp(classes[i] - largest);
  for (int i = 0; i < LABELS; ++i) {
    scores[i] = SOFTMAX ? std::exp(classes[i + 1] - largest) / sum : sigmoid(classes[i]);
    if (quality) scores[i] = std::sqrt(scores[i] * sigmoid(*quality));
  }
}

static float area(const float* box) { return (box[2] - box[0]) * (box[3] - box[1]); }

static float iou(const float* a, const float* b) {
  const float wide = std::min(a[2], b[2]) - std::max(a[0], b[0]);
  const float high = std::min(a[3], b[3]) - std::max(a[1], b[1]);
  const float shared = std::max(wide, 0.0f) * std::max(high, 0.0f);
  return shared / std::max(area(a) + area(b) - shared, 1e-9f);
}

static void sort(std::vector<Detection>& found) {
  std::stable_sort(found.begin(), found.end(),
                   [](const Detection& a, const Detection& b) { return a.score > b.score; });
}

// Heads of one image as the model gives them, anchor by anchor; `quality` is null if it has none.
std::vector<Detection> detect(const float* classes, const float* boxes, const float* quality) {
  const std::vector<Detection> all = decoded(boxes);
  std::vector<float> scores(all.size() * LABELS);
  for (size_t i = 0; i < all.size(); ++i)
    score(classes + i * CLASS_COLUMNS, quality ? quality + i : nullptr, &scores[i * LABELS]);

  std::vector<std::vector<Detection>> parts(OF_CLASS ? LABELS : LEVELS.size());
  size_t level = 0, end = 0;  // of the last level that was begun
  for (size_t i = 0; i < all.size(); ++i) {
    while (i == end) {
      const Level& next = LEVELS[level++];
      end += next.sizes.size() * next.rows * next.columns;
    }
    for (int label = 0; label < LABELS; ++label) {
      Detection one = all[i];
      one.score = scores[i * LABELS + label], one.label = label;
      if (one.score > SCORE_THRESHOLD) parts[OF_CLASS ? label : level - 1].push_back(one);
    }
  }
  std::vector<Detection> candidates, kept;
  for (auto& part : parts) {
    sort(part);
    const size_t count = std::min(part.size(), CANDIDATES);
    candidates.insert(candidates.end(), part.begin(), part.begin() + count);
  }
  sort(candidates);
  for (const Detection& one : candidates) {
    if (kept.size() == DETECTIONS) break;
    if (std::none_of(kept.begin(), kept.end(), [&](const Detection& other) {
          return other.label == one.label && iou(other.edges, one.edges) > NMS_THRESHOLD;
        }))
      kept.push_back(one);
  }
  return kept;
}
