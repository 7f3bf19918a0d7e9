// Package powercut is a disk in memory whose power can be cut under a running program. It keeps apart what was synced and what
// was not, and Cut decides by a seed what of the latter the platter has: nothing, all, the first so many writes with the last one
// torn, or any sector of any write by itself. Mount puts it into the file tree by FUSE, so that the real program works on it.
//
// It is no kinder than a real disk:
//
//   - Bytes are safe only after fsync or fdatasync of their file. Before that any sector may be as it was, or as it was between
//     two writes; sectors that were never written read as zeros or as noise, whatever the file's new length says.
//   - Names are safe only after fsync of their folder, not of the file, as ext4 would have it. Before that every create, link,
//     rename and remove may or may not have happened, in any combination in which a name's own history has no holes. Only a
//     rename is one step: a file is under its old name or its new one.
//   - What was synced stays: there is no mercy of a journal, but no malice either.
//   - An fsync counts from its beginning: what is written while it takes its time is not part of it.
//   - A failed fsync loses what it should have synced. The next one does not bring it back, and says yes.
//
// Owner, mode and times are not subject to all this.
package powercut
