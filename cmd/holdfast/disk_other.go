//go:build !unix

package main

func sameDisk(string, string) bool { return false }

func diskFree(string) int64 { return -1 }

func syncFolder(string) error { return nil }
