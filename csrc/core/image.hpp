// One image on its way through the stages of an op: what the first of them finds out, the others use.
#pragma once

#include <optional>

#include "match_tile.hpp"
#include "parallel.hpp"
#include "tokens.hpp"
#include "workspace.hpp"

namespace script::cpu {

struct Image {
  Scratch scratch;  // memory of the image, for as long as it lives; stages that come and go take their own
  TokenView tokens;
  const Parallel& parallel;
  RowTable rows;
  std::optional<MatchTile> tile;  // the products of the first matching, where they are kept

  Image(const TokenView& view, const Parallel& threads)
      : Image(view, threads, [&](Scratch& s) { return scan_rows(view, nullptr, s, threads); }) {}
  // scan(scratch): the table of the rows.
  template <typename Scan>
  Image(const TokenView& view, const Parallel& threads, const Scan& scan)
      : tokens(view), parallel(threads), rows(scan(scratch)) {}

  // The first matching from here on fills the tile, where it is not too large.
  void keep_products() {
    if (MatchTile::fits(tokens.count)) tile.emplace(tokens.count, scratch);
  }
};

}  // namespace script::cpu
