// Philox4x32-10, the counter-based generator of Salmon et al. (SC 2011): the same numbers on every device, in any order.
#pragma once
#include <stdint.h>

#include "rule.h"

namespace sk {

// The first of the four words that belong to a counter of 128 bits under a key of 64.
SK_RULE uint32_t philox(uint64_t key, uint64_t low, uint32_t third, uint32_t fourth) {
  uint32_t c0 = uint32_t(low), c1 = uint32_t(low >> 32), c2 = third, c3 = fourth;
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t n0 = uint32_t(b >> 32) ^ c1 ^ k0, n2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c1 = uint32_t(b);
    c3 = uint32_t(a);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

}  // namespace sk
