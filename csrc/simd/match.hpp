// What a source token sees of a panel of destinations: see level.cpp.
#pragma once

#include "vectors.hpp"

namespace script::cpu {
namespace {

void match(const float* raw, float source_weight, const float* weight, int columns, int32_t first_column,
           float threshold, MatchLanes* lanes) {
  for (int g = 0; g * kGroup < columns; ++g) {
    SCRIPT_UNROLL(4)
    for (int v = 0; v < kGroupVectors; ++v) {
      const int at = g * kGroup + v * kFloats;
      const int slot = v * kFloats;
      const Int column = lane_numbers() + at;
      const Int inside = column < columns;
      const Vec s = load<Vec>(raw + at) * (load<Vec>(weight + at) * source_weight);
      const Int above = (s >= threshold) & inside;
      const Vec best = load<Vec>(lanes->best + slot);
      const Int better = (s > best) & inside;
      store(lanes->best + slot, better ? s : best);
      store(lanes->best_column + slot, better ? column + first_column : load<Int>(lanes->best_column + slot));
      store(lanes->above + slot, load<Int>(lanes->above + slot) - above);
      store(lanes->above_sum + slot, load<Vec>(lanes->above_sum + slot) + (above ? s : Vec{}));
      store(lanes->sum + slot, load<Vec>(lanes->sum + slot) + (inside ? s : Vec{}));
    }
  }
}

}  // namespace
}  // namespace script::cpu
